"""Memory that runs out in the middle of a step, a merge, a packing: an error, and nothing else."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def test_memory_that_runs_out(tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    source = HERE.parent / "cpp/fail_allocations.cpp"
    if compiler is None or not source.exists():
        pytest.skip("needs a C++ compiler and tests/cpp")
    library = tmp_path / "fail_allocations.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    # One arena, since a new one for every thread would count as used address space.
    environment = {"OMP_NUM_THREADS": "2", "MALLOC_ARENA_MAX": "1", "LD_PRELOAD": str(library)}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "out_of_memory_program.py")],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    faults = dict(json.loads(line) for line in done.stdout.splitlines())
    assert 3 <= faults.pop("a full machine") <= 10
    assert len(faults) == 24 and min(faults.values()) > 0, faults
