"""The kernel set is chosen once a process, by RANDLORA_ISA; an unknown one is refused.

tests/cpp compares every set that this processor can run with loops in double, and all other tests
run the best one.
"""

import os

import pytest
from layer_cases import run_python

from randlora_ext import _C, build_info

CHECK = """
import torch
from randlora_ext import Basis, _C

planes = torch.zeros(2, 1, 1, dtype=torch.int64)
for call in (
    _C.isa,
    lambda: torch.ops.randlora.fill_planes_(planes, 0, 0, 0, 0, 64, 2**31),
    lambda: Basis(4, 4, 2, 0.5).packed(),
):
    try:
        call()
        raise AssertionError("AVX2 is no kernel set; in small letters it is one")
    except RuntimeError as error:
        for part in ("RANDLORA_ISA", "'AVX2'", ", ".join(_C.available_isas())):
            assert part in str(error), error
assert not planes.any()
"""


def test_an_unknown_set_is_refused():
    run_python("-c", CHECK, RANDLORA_ISA="AVX2")


def test_portable_kernels_are_always_there_and_the_best_come_first():
    available, built = _C.available_isas(), build_info()["built_isas"]
    assert available[-1] == "portable" and set(available) <= set(built)
    assert available == [isa for isa in ("avx512", "avx2", "portable") if isa in available]


@pytest.mark.skipif("RANDLORA_ISA" in os.environ, reason="RANDLORA_ISA chooses")
def test_the_best_kernels_run():
    assert _C.isa() == build_info()["isa"] == _C.available_isas()[0]


def test_the_environment_chooses_the_kernels():
    chosen = run_python(
        "-c", "from randlora_ext import _C; print(_C.isa())", RANDLORA_ISA="portable"
    )
    assert chosen.split() == ["portable"]
