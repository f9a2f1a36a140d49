"""An NVIDIA driver that is older than the CUDA library: plain torch on the card, and said so.

There is no card here. Stand-ins are the library, of which only the first two entries of its table
are read, and the driver, which knows its version.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
if not (ROOT / "csrc" / "core").is_dir() or shutil.which("cc") is None:
    pytest.skip("needs a C compiler and the sources of the extension", allow_module_level=True)

LIBRARY = """
static const struct { unsigned long long interface; const char *build; void *rest[64]; } table = {
    INTERFACE, "nvcc 13.0: 900", {0}};
const void *randlora_cuda_kernels(void) { return &table; }
"""
DRIVER = "int cuDriverGetVersion(int *version) { *version = VERSION; return 0; }"
PROGRAM = """
import torch
from torch._subclasses import FakeTensorMode
from randlora_ext import TernaryBasis, diagnostics, explain, linear

has = torch._C._dispatch_has_kernel_for_dispatch_key
print("CUDA kernels registered:", has("randlora::hadamard_linear", "CUDA"))
print(explain(TernaryBasis(64, 48, 8, kind="hadamard"), 16, device="cuda").isa)
basis = TernaryBasis(64, 48, 8, 0.07)
with FakeTensorMode():
    x, W, lam, gam = (
        torch.empty(shape, device="cuda")
        for shape in ((16, 64), (48, 64), (basis.r, basis.n), (basis.n, basis.d))
    )
    try:
        linear(x, W, None, basis, lam, gam)
    except ValueError as error:
        print(error)
print(*diagnostics.describe(), sep="\\n")
"""


def interface() -> str:
    """As setup.py computes it."""
    files = sorted((ROOT / "csrc" / "core").glob("*.h"))
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    return f"0x{hashlib.sha256(''.join(digests).encode()).hexdigest()[:16]}u"


@pytest.fixture
def machine(tmp_path):
    """Makes the environment of a process that finds the stand-ins; without a version no driver."""

    def compiled(name: str, source: str, definition: str) -> None:
        argv = ["cc", "-x", "c", "-shared", "-fPIC", f"-D{definition}", "-", "-o", tmp_path / name]
        subprocess.run(argv, input=source, text=True, check=True)

    def make(version: int | None) -> dict[str, str]:
        compiled("library.so", LIBRARY, f"INTERFACE={interface()}")
        if version is not None:
            compiled("libcuda.so.1", DRIVER, f"VERSION={version}")
        settings = {k: v for k, v in os.environ.items() if not k.startswith("RANDLORA_")}
        paths = filter(None, [str(tmp_path), settings.get("LD_LIBRARY_PATH")])
        return settings | {
            "RANDLORA_CUDA_LIBRARY": str(tmp_path / "library.so"),
            "LD_LIBRARY_PATH": os.pathsep.join(paths),
        }

    return make


def python(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, text=True,
                          capture_output=True)  # fmt: skip


def test_an_old_driver_leaves_plain_torch_and_randlora_says_so(machine):
    done = python(machine(12080), "-c", PROGRAM)
    assert done.returncode == 0, done.stderr
    said = "the CUDA kernels are not loaded: the NVIDIA driver is for CUDA 12.8, and the kernels, "
    assert done.stderr.count(f"RuntimeWarning: randlora_ext: {said}") == 1, done.stderr
    assert "need a driver for CUDA 13" in done.stderr
    registered, hadamard, independent, *checked = done.stdout.splitlines()
    assert registered.endswith("False") and hadamard == "plain torch"
    assert "no kernels are loaded" in independent and "build_info()['cuda']" in independent
    (line,) = (line for line in checked if line.startswith("CUDA kernels"))
    assert line.startswith("CUDA kernels: not loaded: the NVIDIA driver is for CUDA 12.8")


@pytest.mark.parametrize("version", [13000, 14000, None])
def test_other_drivers_and_none_load_the_kernels(machine, version):
    program = PROGRAM.partition("print(explain")[0]
    program += "import randlora_ext\nprint(randlora_ext.build_info())"
    done = python(machine(version), "-W", "error", "-c", program)
    assert done.returncode == 0, done.stderr
    assert "registered: True" in done.stdout and "'cuda': 'nvcc 13.0: 900'" in done.stdout
