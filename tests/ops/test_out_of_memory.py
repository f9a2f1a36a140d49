"""Memory that runs out in the middle of a step, a merge, a packing: an error, and nothing else.

This file, run as a program with fail_allocations.cpp preloaded, tries every action with its first
allocation failing, then its second, and so on until one goes through; and a step under a limit on
the address space, as on a machine that is full. After each fault nothing may have changed, and the
layer has to compute the same bits. It prints the number of faults of each action.
"""

import ctypes
import json
import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from layer_cases import imported_basis, run_python
from layer_helpers import inputs, make_base, randomize, run

from randlora_ext import Basis, RandLoraLinear
from randlora_ext.basis import cache

FAULTS = ctypes.CDLL(None)
LISTS = {"basis": "independent", "density": 0.07}
BASES = [LISTS, {"basis": "independent", "density": 1 / 3}, {"basis": "hadamard"}]


def fails(action) -> bool:
    """Whether `action()` ended with an error, which must be about memory."""
    try:
        action()
    except (RuntimeError, MemoryError) as error:
        assert "memory" in str(error).lower() or isinstance(error, MemoryError), error
        return True
    return False


def bits(tensors) -> list[bytes]:
    return [t.detach().float().numpy().tobytes() for t in tensors]


def state(layer: RandLoraLinear) -> list:
    tensors = layer.state_dict()
    return [layer.merged_adapters[:], [*tensors], bits(tensors.values())]


def try_all(name: str, options: dict, action, prepare=lambda layer: None, dtype=torch.float32):
    """Prints how many allocations of `action(layer)` were made to fail."""

    def fresh() -> RandLoraLinear:
        assert not cache._cache, "somebody holds a basis"  # none is packed yet
        layer = randomize(RandLoraLinear(make_base(130, 70, dtype=dtype), r=9, **options))
        prepare(layer)
        return layer

    def results(layer) -> list[bytes]:
        x, dy = inputs(layer, 33, dtype=dtype)
        return bits([layer(x)] if layer.merged else run(layer, x, dy))

    expected, faults = results(fresh()), 0
    while True:
        layer = fresh()
        before, failed = state(layer), FAULTS.failures()
        FAULTS.fail_at(ctypes.c_long(faults))
        raised = fails(lambda layer=layer: action(layer))
        FAULTS.fail_at(ctypes.c_long(-1))
        assert raised == (FAULTS.failures() > failed), "an allocation failed and nothing was raised"
        if not raised:
            break
        faults += 1
        assert before == state(layer), f"{name}: fault {faults} left a change"
        assert results(layer) == expected, f"{name}: fault {faults} changed a result"
        action(layer)  # and what failed can be done
        del layer
    print(json.dumps([name, faults]), flush=True)


def step(layer):
    x, dy = inputs(layer, 33, dtype=layer.weight.dtype)
    layer(x.requires_grad_()).backward(dy)
    layer.zero_grad()


def full_machine() -> None:
    layer = randomize(RandLoraLinear(make_base(256, 384), r=16, **LISTS))
    small, large = inputs(layer, 40), inputs(layer, 20_000)
    expected, failed = bits(run(layer, *small)), 0
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    for spare in range(0, 200 << 20, 20 << 20):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + spare, hard))
        failed += fails(lambda: run(layer, *large))
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        assert bits(run(layer, *small)) == expected
    run(layer, *large)
    print(json.dumps(["a full machine", failed]))


def main() -> None:
    FAULTS.failures.restype = ctypes.c_long
    torch.set_num_threads(2)
    full_machine()
    for kind in BASES:
        try_all(f"step, {kind}", kind, step)
        try_all(f"bfloat16 step, {kind}", kind, step, dtype=torch.bfloat16)
        try_all(f"delta weight, {kind}", kind, lambda layer: layer.get_delta_weight("default"))
        try_all(f"dense bases, {kind}", kind, lambda layer: layer.bases["default"].dense())
    try_all("merge", LISTS, lambda layer: layer.merged or layer.merge())
    dense = Basis(130, 70, 9, 0.3).dense()
    try_all("import", LISTS, lambda layer: imported_basis(*dense, 130, 70).packed())


def test_memory_that_runs_out(tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    source = Path(__file__).resolve().parents[1] / "cpp/fail_allocations.cpp"
    if compiler is None or not source.exists():
        pytest.skip("needs a C++ compiler and tests/cpp")
    library = tmp_path / "fail_allocations.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    # One arena, since a new one for every thread would count as used address space.
    environment = {"OMP_NUM_THREADS": "2", "MALLOC_ARENA_MAX": "1", "LD_PRELOAD": str(library)}
    printed = run_python("-W", "ignore", __file__, **environment)
    faults = dict(map(json.loads, printed.splitlines()))
    assert 3 <= faults.pop("a full machine") <= 10
    assert len(faults) == 14 and min(faults.values()) > 0, faults


if __name__ == "__main__":
    main()
