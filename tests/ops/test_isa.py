"""Every kernel set that this processor can run gives right results; an unknown one is refused.

The set is chosen once a process by RANDLORA_ISA, so each runs in a child of a program that has not
chosen any; the best one runs in all other tests. tests/cpp has float64 and what draws bases.
"""

import os

from layer_cases import run_python

from randlora_ext import _C, build_info

CHECK = """
import os
import torch
import torch.distributed.tensor  # as autograd and assert_close do: here, once for every child
from layer_cases import assert_rule, exact, make_layer, ours, plain
from randlora_ext import TernaryBasis, _C, build_info, scaled_basis

planes = torch.zeros(2, 1, 1, dtype=torch.int64)
for call in (
    _C.isa,
    build_info,
    lambda: torch.ops.randlora.fill_planes_(planes, 0, 0, 0, 0, 64, 2**31),
    lambda: TernaryBasis(4, 4, 2, 0.5).packed(),
):
    try:
        call()
    except RuntimeError as error:
        told = str(error)
        for part in ("RANDLORA_ISA", "'AVX2'", ", ".join(_C.available_isas())):
            assert part in told, told
    else:
        raise AssertionError("AVX2 is no kernel set; in small letters it is one")
assert not planes.any()
for isa in ("", *_C.available_isas()[1:]):
    os.environ["RANDLORA_ISA"] = isa
    child = os.fork()
    if not child:
        break
    assert os.waitpid(child, 0)[1] == 0, isa
else:
    raise SystemExit  # every child went through
wanted = isa or _C.available_isas()[0]  # empty means the default
assert _C.isa() == wanted
for kind in (1 / 3, 0.07, "hadamard"):
    for shape in ((157, 93, 9), (93, 157, 9), (20, 24, 32), (600, 530, 16), (3, 2, 2)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            layer = make_layer(*shape, kind, 33, dtype)
            floor = 2 if kind == "hadamard" else 1
            assert_rule(ours(layer), plain(layer), exact(layer), dtype, floor=floor)
# Conversions to 16 bits: ties, subnormals, overflow, infinities and NaN as torch rounds them.
values = torch.cat([torch.randn(4000) * 2.0 ** torch.randint(-30, 20, (4000,)), torch.tensor(
    [0.0, -0.0, 65504.0, 65519.0, 65520.0, 1e9, -1e9, 2.0**-24, 2.0**-25, 3 * 2.0**-25, 6e-5,
     float("inf"), -float("inf"), float("nan"), 1 + 2.0**-11, 1 + 3 * 2.0**-11, 3.4e38]),
    torch.tensor([0x7FC00001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)])  # NaN
one = torch.ones(1, 1)
for dtype in (torch.float16, torch.bfloat16):
    got = scaled_basis(torch.ones(1, len(values), dtype=dtype), one, values[None])[0]
    torch.testing.assert_close(got, values.to(dtype), rtol=0, atol=0, equal_nan=True)
    low = values.to(dtype)
    back = torch.ops.randlora.scaled_basis_backward(
        low[None], torch.ones(1, len(values)), one, torch.ones(1, len(values)))[1][0]
    torch.testing.assert_close(back, low.float(), rtol=0, atol=0, equal_nan=True)
"""


def test_every_kernel_set():
    # One thread: test_determinism.py tells that the number changes nothing. And none to fork.
    run_python("-c", CHECK, OMP_NUM_THREADS="1", RANDLORA_ISA="AVX2")


def test_portable_kernels_are_always_there_and_the_best_come_first():
    available, built = _C.available_isas(), build_info()["built_isas"]
    assert available[-1] == "portable" and set(available) <= set(built)
    assert available == [isa for isa in ("avx512", "avx2", "portable") if isa in available]
    if "RANDLORA_ISA" not in os.environ:
        assert _C.isa() == build_info()["isa"] == available[0]
