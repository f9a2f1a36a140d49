"""Builds randlora_ext._C (the binding and torch-free CPU kernels, one library per instruction set)
and, under a torch with CUDA, librandlora_cuda.so beside it (tools/cuda/cuda_library.py).

RANDLORA_CUDA=1 requires the CUDA kernels, whatever the torch; 0 leaves them out. Unset, a CUDA
library that cannot be built costs a line, not the installation.
RANDLORA_DEBUG=1 builds with -O0 -g.
RANDLORA_SANITIZE=address,undefined (or thread) instruments the CPU kernels and the binding;
tools/run_sanitized_python.sh shows how to run the result.
"""

import hashlib
import os
import platform
import shlex
import shutil
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import torch
from setuptools import setup
from setuptools.command.build_clib import build_clib
from torch.utils.cpp_extension import BuildExtension, CppExtension

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "tools" / "cuda"))  # which a build frontend does not do

import cuda_library  # noqa: E402

VERSION = (HERE / "VERSION").read_text().strip()
DEBUG = os.environ.get("RANDLORA_DEBUG") == "1"
OPTIMISE = ["-O0", "-g"] if DEBUG else ["-O3", "-g0"]
SANITIZE = []
if os.environ.get("RANDLORA_SANITIZE"):
    SANITIZE = [f"-fsanitize={os.environ['RANDLORA_SANITIZE']}", "-fno-sanitize-recover=all"]
    OPTIMISE = ["-O1", "-g"]  # as in CMakeLists.txt
COMMON = ["-std=c++17", "-fvisibility=hidden", "-fPIC", "-Wall", *OPTIMISE, *SANITIZE]

# The same flags stand in CMakeLists.txt.
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"]
ISA_FLAGS = {"portable": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS["avx2"] = AVX2
    ISA_FLAGS["avx512"] = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]


def sources_in(*folders: str, suffix: str) -> list[str]:
    found = (path for folder in folders for path in (HERE / "csrc" / folder).rglob(f"*{suffix}"))
    return sorted(str(path.relative_to(HERE)) for path in found)


def kernel_library(isa: str) -> tuple[str, dict]:
    source = f"csrc/cpu/isa_{isa}.cpp"
    return f"randlora_{isa}", {
        "sources": [source],
        "obj_deps": {"": sources_in("core", "cpu", suffix=".h"), source: []},
        "cflags": [*COMMON, *ISA_FLAGS[isa]],
    }


# pip would give every editable install a new folder, and compile all of it again. Objects of other
# flags or compilers lie in others.
FLAGS = hashlib.sha256(" ".join([*COMMON, os.environ.get("CXX", "")]).encode()).hexdigest()[:8]
BUILD = f"build/temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}-{FLAGS}"


class BuildLibraries(build_clib):
    """Side by side: that for AVX-512 alone takes as long as the others together."""

    def finalize_options(self):
        super().finalize_options()
        self.build_temp = self.build_clib = BUILD

    def build_libraries(self, libraries):
        # First, because what is left over in build/ would let it fail at some later step.
        compiler = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX"))[0]
        if shutil.which(compiler) is None:
            raise SystemExit(
                f"error: there is no C++ compiler {compiler!r}; install g++ or clang++, or set CXX"
            )
        build_one = super().build_libraries
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda library: build_one([library]), libraries))


class BuildKernels(BuildExtension):
    def finalize_options(self):
        super().finalize_options()
        self.build_temp = BUILD

    def run(self):
        cuda = self.cuda_library()
        # `build_ext --inplace` and editable installs do not run build_clib by themselves.
        self.run_command("build_clib")
        super().run()
        print(f"randlora_ext {VERSION}: CPU kernels for {', '.join(ISA_FLAGS)}; {cuda}")

    def cuda_library(self) -> str:
        """Builds it where that is wanted; says in one line what there is of it."""
        library = cuda_library.LIBRARY
        wanted, nvcc = os.environ.get("RANDLORA_CUDA", ""), cuda_library.find_nvcc()
        plan = cuda_library.plan(wanted, torch.version.cuda, nvcc, library.exists())
        says = plan.says
        if plan.build:
            try:
                says = cuda_library.build(nvcc, DEBUG)
            except cuda_library.CannotBuild as error:
                if wanted == "1":
                    raise SystemExit(f"error: RANDLORA_CUDA=1, but {error}") from None
                library.unlink(missing_ok=True)
                says = f"no CUDA kernels: {error}"
        if wanted == "0":
            library.unlink(missing_ok=True)
        packaged = Path(self.build_lib) / "randlora_ext" / library.name
        packaged.unlink(missing_ok=True)
        if library.exists() and not self.inplace:
            packaged.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, packaged)
        return says


def binding():
    ext = CppExtension(
        "randlora_ext._C",
        sources_in("python", "torch", suffix=".cpp")
        + [f"csrc/cpu/{name}.cpp" for name in ("dispatch", "packing")],
        include_dirs=[pybind11.get_include()],
        depends=sources_in("core", "cpu", "torch", suffix=".h"),
        extra_compile_args=[
            *COMMON,
            "-DTORCH_TARGET_VERSION=0x020b000000000000",  # 2.11, the oldest that is supported
            f'-DRANDLORA_VERSION="{VERSION}"',
            f"-DRANDLORA_CUDA_INTERFACE={cuda_library.interface()}",
        ],
        extra_link_args=SANITIZE,
    )
    # Nothing of torch's Python binding is used: the file depends on the stable ABI alone.
    ext.libraries = [name for name in ext.libraries if name != "torch_python"]
    return ext


setup(
    version=VERSION,
    libraries=[kernel_library(isa) for isa in ISA_FLAGS],
    ext_modules=[binding()],
    cmdclass={"build_clib": BuildLibraries, "build_ext": BuildKernels},
)
