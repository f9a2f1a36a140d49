"""An NVIDIA driver that is older than the CUDA library: plain torch on the card, and said so.

There is no card here. Stand-ins are the library, of which only the first two entries of its table
are read, and the driver, which knows its version.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_interface import interface

ROOT = Path(__file__).parents[2]
if not (ROOT / "csrc" / "core").is_dir() or shutil.which("cc") is None:
    pytest.skip("needs a C compiler and the sources of the extension", allow_module_level=True)

LIBRARY = """
static const struct { unsigned long long interface; const char *build; void *rest[64]; } table = {
    INTERFACE, "nvcc 13.0: 900", {0}};
const void *randlora_cuda_kernels(void) { return &table; }
"""
DRIVER = """
#include <stdlib.h>
int cuDriverGetVersion(int *version) { *version = atoi(getenv("DRIVER")); return 0; }
"""
PROGRAM = """
import os, sys, warnings
import torch
from torch._subclasses import FakeTensorMode

for version in sys.argv[1:]:
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        continue
    os.environ["DRIVER"] = version
    if version == "none":
        os.unlink(os.environ["LD_LIBRARY_PATH"].split(":")[0] + "/libcuda.so.1")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        import randlora_ext
    has = torch._C._dispatch_has_kernel_for_dispatch_key("randlora::hadamard_linear", "CUDA")
    print("driver", version, has, randlora_ext.build_info()["cuda"], sep="|")
    print(*(warning.message for warning in told if "randlora" in str(warning.message)), sep="\\n")
    if has:
        break
    from randlora_ext import Basis, diagnostics, linear

    basis = Basis(64, 48, 8, 0.07)
    shapes = (16, 64), (48, 64), (basis.r, basis.n), (basis.n, basis.d)
    with FakeTensorMode():
        x, W, lam, gam = (torch.empty(shape, device="cuda") for shape in shapes)
        try:
            linear(x, W, None, basis, lam, gam)
        except ValueError as error:
            print(error)
    print(*diagnostics.describe(), sep="\\n")
    break
"""


def test_only_an_old_driver_leaves_plain_torch_and_randlora_says_so(tmp_path):
    for name, source in (("library.so", LIBRARY), ("libcuda.so.1", DRIVER)):
        command = ["cc", "-x", "c", "-shared", "-fPIC", f"-DINTERFACE={interface()}", "-"]
        subprocess.run([*command, "-o", tmp_path / name], input=source, text=True, check=True)
    settings = {k: v for k, v in os.environ.items() if not k.startswith("RANDLORA_")}
    paths = filter(None, [str(tmp_path), settings.get("LD_LIBRARY_PATH")])
    settings["LD_LIBRARY_PATH"] = os.pathsep.join(paths)
    settings["RANDLORA_CUDA_LIBRARY"] = str(tmp_path / "library.so")
    # One process imports torch and forks for each version.
    command = [sys.executable, "-c", PROGRAM, "12080", "13000", "14000", "none"]
    done = subprocess.run(command, env=settings, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    old, *others = done.stdout.split("driver|")[1:]
    assert others == [f"{v}|True|nvcc 13.0: 900\n\n" for v in ("13000", "14000", "none")]
    registered, warning, independent, *checked = old.splitlines()
    said = "not loaded: the NVIDIA driver is for CUDA 12.8, and the kernels, "
    assert registered.startswith("12080|False|not loaded: the NVIDIA driver is for CUDA 12.8")
    assert warning.startswith(f"randlora_ext: the CUDA kernels are {said}")
    assert "need a driver for CUDA 13" in warning
    assert "independent bases need our kernels, which are not loaded: the NVIDIA" in independent
    (line,) = (line for line in checked if line.startswith("CUDA kernels"))
    assert line.startswith("CUDA kernels: not loaded: the NVIDIA driver is for CUDA 12.8")
