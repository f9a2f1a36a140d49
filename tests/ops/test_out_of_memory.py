"""Memory that runs out in the middle of a step, a merge, a packing: an error, and nothing else.

Two ways: every single allocation of a tensor is made to fail, one after the other
(out_of_memory_program.py); and a limit on the address space, as a machine that is full.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def run_python(arguments, **environment):
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "2"}
        | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_every_allocation_fails_once(tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    source = HERE.parent / "cpp/fail_allocations.cpp"
    if compiler is None or not source.exists():
        pytest.skip("needs a C++ compiler and tests/cpp")
    library = tmp_path / "fail_allocations.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    done = run_python([str(HERE / "out_of_memory_program.py")], LD_PRELOAD=str(library))
    assert done.returncode == 0, done.stderr[-3000:]
    faults = dict(json.loads(line) for line in done.stdout.splitlines())
    assert len(faults) == 24 and min(faults.values()) > 0, faults
    print(f"{sum(faults.values())} faults in {len(faults)} actions")


LIMITED = """
import resource, torch
from layer_helpers import inputs, make_base, randomize, run
from randlora_ext import RandLoraLinear
torch.set_num_threads(2)
layer = randomize(RandLoraLinear(make_base(256, 384), r=16, density=0.07))
small, large = inputs(layer, 40), inputs(layer, 20_000)
expected = run(layer, *small)
failed = 0
for spare in range(0, 200 << 20, 20 << 20):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, hard))
    try:
        run(layer, *large)
    except (RuntimeError, MemoryError) as error:
        assert "memory" in str(error) or isinstance(error, MemoryError), error
        failed += 1
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    assert all(torch.equal(a, b) for a, b in zip(run(layer, *small), expected, strict=True))
run(layer, *large)
print(failed)
"""


def test_a_full_machine():
    # One arena, since a new one for every thread would count as used address space.
    done = run_python(["-c", LIMITED], MALLOC_ARENA_MAX="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert 3 <= int(done.stdout) <= 10, done.stdout
