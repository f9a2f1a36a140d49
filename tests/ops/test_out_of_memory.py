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

from randlora_ext import RandLoraLinear, TernaryBasis
from randlora_ext.basis import cache

FAULTS = ctypes.CDLL(None)
BASES = {
    "planes": {"density": 1 / 3},
    "lists": {"density": 0.07},
    "hadamard": {"basis": "hadamard"},
}


def with_failing_allocation(n: int, action) -> bool:
    """Whether `action()` ended with an error because its n-th allocation failed."""
    before = FAULTS.failures()
    FAULTS.fail_at(ctypes.c_long(n))
    try:
        action()
        raised = False
    except (RuntimeError, MemoryError) as error:
        assert "memory" in str(error).lower() or isinstance(error, MemoryError), error
        raised = True
    finally:
        FAULTS.fail_at(ctypes.c_long(-1))
    assert raised == (FAULTS.failures() > before), "an allocation failed and nothing was raised"
    return raised


def snapshot(layer: RandLoraLinear) -> list:
    state = layer.state_dict()
    return [sorted(state), layer.merged_adapters[:], [*layer.bases], layer.active_adapters] + [
        state[name].clone() for name in sorted(state)
    ]


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(a, b, strict=True)
    )


def results(layer: RandLoraLinear, x: torch.Tensor, dy: torch.Tensor) -> list:
    return [layer(x)] if layer.merged else run(layer, x, dy)


def fresh(options: dict, dtype=torch.float32) -> RandLoraLinear:
    """A layer whose basis is not packed yet."""
    assert not cache._cache, "somebody holds a basis"
    base = make_base(130, 70, dtype=dtype)
    return randomize(RandLoraLinear(base, r=9, **({"basis": "independent"} | options)))


def try_all(name: str, options: dict, action, prepare=lambda layer: None, dtype=torch.float32):
    """Prints how many allocations of `action(layer)` were made to fail."""
    layer = fresh(options, dtype)
    prepare(layer)
    x, dy = inputs(layer, 33, dtype=dtype)
    expected = results(layer, x, dy)
    del layer
    faults = 0
    while True:
        layer = fresh(options, dtype)
        prepare(layer)
        before = snapshot(layer)
        if not with_failing_allocation(faults, lambda layer=layer: action(layer)):
            break
        faults += 1
        assert same(before, snapshot(layer)), f"{name}: fault {faults} left a change"
        for got, want in zip(results(layer, x, dy), expected, strict=True):
            assert torch.equal(got, want), f"{name}: fault {faults} changed a result"
        action(layer)  # and what failed can be done
        del layer
    print(json.dumps([name, faults]), flush=True)


def step(layer):
    x, dy = inputs(layer, 33, dtype=layer.weight.dtype)
    layer(x.requires_grad_()).backward(dy)
    layer.zero_grad()


def full_machine() -> None:
    layer = randomize(RandLoraLinear(make_base(256, 384), r=16, density=0.07, basis="independent"))
    small, large = inputs(layer, 40), inputs(layer, 20_000)
    expected = run(layer, *small)
    failed = 0
    for spare in range(0, 200 << 20, 20 << 20):
        with open("/proc/self/statm") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (used + spare, hard))
        try:
            run(layer, *large)
        except (RuntimeError, MemoryError) as error:
            assert "memory" in str(error) or isinstance(error, MemoryError), error
            failed += 1
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        assert same(run(layer, *small), expected)
    run(layer, *large)
    print(json.dumps(["a full machine", failed]))


def main() -> None:
    FAULTS.failures.restype = ctypes.c_long
    torch.set_num_threads(2)
    full_machine()
    for kind, options in BASES.items():
        try_all(f"step, {kind}", options, step)
        try_all(f"bfloat16 step, {kind}", options, step, dtype=torch.bfloat16)
        try_all(f"delta weight, {kind}", options, lambda layer: layer.get_delta_weight("default"))
        try_all(f"dense bases, {kind}", options, lambda layer: layer.get_scaled_bases("default"))
    lists = BASES["lists"]
    nothing = {"keep_weight": "nothing"}  # putting a kept W back allocates nothing
    for options in ({}, nothing):
        try_all(
            f"merge {options}", lists, lambda layer, o=options: layer.merged or layer.merge(**o)
        )
    try_all("unmerge", lists, lambda layer: layer.unmerge(), lambda layer: layer.merge(**nothing))
    try_all(
        "another adapter",
        lists,
        lambda layer: layer.update_layer("two", 5, density=0.3, basis="independent"),
    )

    dense = TernaryBasis(130, 70, 9, 0.3).dense()
    try_all("import", lists, lambda layer: imported_basis(*dense, 130, 70).packed())


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
    assert len(faults) == 17 and min(faults.values()) > 0, faults


if __name__ == "__main__":
    main()
