"""Builds randlora_ext._C (the binding and torch-free CPU kernels, one library per instruction set)
and, under a torch with CUDA, librandlora_cuda.so beside it.

RANDLORA_CUDA=1 requires the CUDA kernels, 0 leaves them out. RANDLORA_DEBUG=1 builds with -O0 -g.
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
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

HERE = Path(__file__).resolve().parent
CUDA_LIBRARY = "librandlora_cuda"

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
        # `build_ext --inplace` and editable installs do not run build_clib by themselves.
        self.run_command("build_clib")
        super().run()
        print(f"randlora_ext {VERSION}: CPU kernels for {', '.join(ISA_FLAGS)}; {CUDA_STATUS}")

    def get_ext_filename(self, ext_name):
        filename = super().get_ext_filename(ext_name)
        if ext_name.endswith(CUDA_LIBRARY):  # not a Python module: dlopen finds it by this name
            filename = filename.replace(sysconfig.get_config_var("EXT_SUFFIX"), ".so")
        return filename


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
            cuda_interface(),
        ],
        extra_link_args=SANITIZE,
    )
    # Nothing of torch's Python binding is used: the file depends on the stable ABI alone.
    ext.libraries = [name for name in ext.libraries if name != "torch_python"]
    return ext


def cuda_interface() -> str:
    """The binding refuses a CUDA library that was built from other headers. CMakeLists.txt computes
    the same number."""
    digests = [
        hashlib.sha256((HERE / path).read_bytes()).hexdigest()
        for path in sources_in("core", suffix=".h")
    ]
    digest = hashlib.sha256("".join(digests).encode()).hexdigest()
    return f"-DRANDLORA_CUDA_INTERFACE=0x{digest[:16]}u"


def cuda_kernels():
    ext = CUDAExtension(
        f"randlora_ext.{CUDA_LIBRARY}",
        sources_in("cuda", suffix=".cu") + sources_in("cuda", suffix=".cpp"),
        depends=sources_in("core", "cuda", suffix=".h"),
        extra_compile_args={
            "cxx": COMMON,
            "nvcc": [
                *("-std=c++17", "-O3", "-Xcompiler", "-fvisibility=hidden,-Wall"),
                *(["-g", "-lineinfo"] if DEBUG else []),
                cuda_interface(),
            ],
        },
        extra_link_args=["-Wl,--version-script=csrc/cuda/exports.map", "-Wl,--no-undefined"],
    )
    # No torch and no shared CUDA runtime: the binding opens this file at run time, so one wheel
    # serves CPU and CUDA builds of every torch.
    ext.libraries = ["cudart_static", "dl", "rt", "pthread"]
    return ext


def cuda_status() -> tuple[bool, str]:
    """Whether to build the CUDA kernels; and what the package will have of them."""
    wanted = os.environ.get("RANDLORA_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"RANDLORA_CUDA={wanted!r} must be 0, 1 or unset")
    library = HERE / "randlora_ext" / f"{CUDA_LIBRARY}.so"
    if wanted == "0":
        library.unlink(missing_ok=True)
        return False, "no CUDA kernels, because RANDLORA_CUDA=0"
    if torch.version.cuda is None:
        if library.exists():  # by CMake; it goes into the package as it is
            return False, f"CUDA kernels as found in {library}"
        why = "this torch has no CUDA; build under one that has, or with CMake (CONTRIBUTING.md)"
    elif CUDA_HOME is None:
        why = f"nvcc was not found; install CUDA {torch.version.cuda}'s toolkit and set CUDA_HOME"
    else:
        return True, f"CUDA kernels by the nvcc of {CUDA_HOME}"
    if wanted == "1":
        raise SystemExit(f"RANDLORA_CUDA=1, but {why}")
    return False, f"no CUDA kernels: {why}"


WITH_CUDA, CUDA_STATUS = cuda_status()
if WITH_CUDA and not torch.cuda.is_available():  # torch would ask the cards of this machine
    blackwell = ";10.0;12.0" if torch.version.cuda >= "12.8" else ""
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"8.0;8.6;8.9;9.0{blackwell}+PTX")

setup(
    version=VERSION,
    libraries=[kernel_library(isa) for isa in ISA_FLAGS],
    ext_modules=[binding(), *([cuda_kernels()] if WITH_CUDA else [])],
    cmdclass={"build_clib": BuildLibraries, "build_ext": BuildKernels},
)
