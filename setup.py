"""Builds randlora_ext._C (the binding and torch-free CPU kernels, one library per instruction set)
and, under a torch with CUDA and an nvcc of its major version, librandlora_cuda.so beside it.

RANDLORA_CUDA=1 requires the CUDA kernels, 0 leaves them out. Unset, a CUDA library that cannot be
built costs a line, not the installation. RANDLORA_DEBUG=1 builds with -O0 -g.
RANDLORA_SANITIZE=address,undefined (or thread) instruments the CPU kernels and the binding;
tools/run_sanitized_python.sh shows how to run the result.
"""

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
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
LIBRARY = HERE / "randlora_ext" / "librandlora_cuda.so"
CUDA_EXTENSION = f"randlora_ext.{LIBRARY.stem}"
BY_CMAKE = (
    "or let CMake build the library, without torch, and install again: cmake -S . -B build-cuda "
    "-DRANDLORA_CUDA=ON && cmake --build build-cuda --target randlora_cuda && "
    'cmake --install build-cuda (CONTRIBUTING.md, "The CUDA library")'
)

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


def compiler() -> str:
    """CXX if that is set, else the first that is there. Exits if it is none."""
    given = os.environ.get("CXX")
    if given and len(shlex.split(given)) > 1:
        raise SystemExit(f"error: CXX must be one program, without arguments, got {given!r}")
    usual = shlex.split(sysconfig.get_config_var("CXX") or "")[:1] + ["c++", "g++", "clang++"]
    wanted = [given] if given else usual
    found = [name for name in wanted if shutil.which(name)]
    if not found:
        raise SystemExit(
            f"error: there is no C++ compiler {wanted[0]!r}; install g++ or clang++, or set CXX"
        )
    return found[0]


# pip would give every editable install a new folder, and compile all of it again. Objects of other
# flags or compilers lie in others.
OF_OBJECTS = [*COMMON, repr(ISA_FLAGS), *map(os.environ.get, ("CXX", "CFLAGS", "CXXFLAGS"))]
FLAGS = hashlib.sha256(repr(OF_OBJECTS).encode()).hexdigest()[:8]
BUILD = f"build/temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}-{FLAGS}"


def max_jobs() -> int:
    """0 sets no limit, as for ninja; a text that is no number is ignored, as by torch."""
    wanted = os.environ.get("MAX_JOBS", "")
    return (int(wanted) if wanted.isdigit() else 0) or os.cpu_count() or 1


class BuildLibraries(build_clib):
    """Side by side: that for AVX-512 alone takes as long as the others together."""

    def finalize_options(self):
        super().finalize_options()
        self.build_temp = self.build_clib = BUILD

    def run(self):
        # First, because what is left over in build/ would let it fail at some later step.
        os.environ["CXX"] = compiler()
        super().run()

    def build_libraries(self, libraries):
        build_one = super().build_libraries
        with ThreadPoolExecutor(max_jobs()) as pool:
            list(pool.map(lambda library: build_one([library]), libraries))


class BuildKernels(BuildExtension):
    def finalize_options(self):
        super().finalize_options()
        self.build_temp = BUILD

    def run(self):
        self.cuda_status = CUDA_STATUS
        if WANTED == "0":
            LIBRARY.unlink(missing_ok=True)
        # `build_ext --inplace` and editable installs do not run build_clib by themselves.
        self.run_command("build_clib")
        super().run()
        if not any(ext.name == CUDA_EXTENSION for ext in self.extensions):
            self.package_what_is_there()
        print(f"randlora_ext {VERSION}: CPU kernels for {', '.join(ISA_FLAGS)}; {self.cuda_status}")

    def build_extensions(self):
        """The CUDA library last and alone: torch's checks of nvcc, and nvcc, may fail."""
        binding_alone = [ext for ext in self.extensions if ext.name != CUDA_EXTENSION]
        cuda = [ext for ext in self.extensions if ext.name == CUDA_EXTENSION]
        self.extensions = binding_alone
        super().build_extensions()
        if not cuda:
            return
        self.extensions = cuda
        try:
            super().build_extensions()
        except Exception as error:  # whatever it is, the CPU kernels are built
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            why = f"building them failed: {said}; read the messages above"
            if WANTED == "1":
                raise SystemExit(f"error: RANDLORA_CUDA=1, but {why}, {BY_CMAKE}") from error
            self.cuda_status = f"no CUDA kernels: {why}, {BY_CMAKE}"
            if LIBRARY.exists():
                self.cuda_status = f"CUDA kernels as found in {LIBRARY}; {why}"
            self.extensions = binding_alone
        else:
            self.extensions = binding_alone + cuda

    def package_what_is_there(self):
        """A library that CMake has installed, but not what an earlier build left in build/."""
        packaged = Path(self.build_lib) / "randlora_ext" / LIBRARY.name
        packaged.unlink(missing_ok=True)
        if LIBRARY.exists() and not self.inplace:
            packaged.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(LIBRARY, packaged)

    def get_ext_filename(self, ext_name):
        filename = super().get_ext_filename(ext_name)
        if ext_name.endswith(LIBRARY.stem):  # not a Python module: dlopen finds it by this name
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
        CUDA_EXTENSION,
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


# ---- whether to build the CUDA library: functions of what was found, which tests call ------------


def architectures(
    asked: str, cards: list[tuple[int, int]], nvcc: tuple[int, int]
) -> tuple[list[str], list[str]]:
    """What TORCH_CUDA_ARCH_LIST (`asked`), or else the cards of this machine, or else the usual
    ones want; and what is left out of it, because the kernels need 8.0.
    """
    if asked not in ("", "native"):
        wanted = re.split(r"[;\s]+", asked.strip("; "))
    elif cards:
        wanted = [f"{major}.{minor}" for major, minor in sorted(set(cards))]
        wanted[-1] += "+PTX"
    elif nvcc >= (12, 8):
        wanted = "8.0 8.6 8.9 9.0 10.0 12.0+PTX".split()
    else:
        wanted = "8.0 8.6 8.9 9.0+PTX".split()
    old = [arch for arch in wanted if re.match(r"[1-7]\.", arch)]
    return [arch for arch in wanted if arch not in old], old


def why_not(
    torch_cuda: str | None, nvcc: tuple[int, int] | None, kept: list[str], old: list[str]
) -> str:
    """Why torch cannot build the library, and what to do; empty if it can."""
    if torch_cuda is None:
        return "this torch has no CUDA; build under one that has, or with CMake (CONTRIBUTING.md)"
    toolkit = f"install CUDA {torch_cuda}'s toolkit and set CUDA_HOME"
    if nvcc is None:
        return f"nvcc was not found; {toolkit}"
    if nvcc[0] != int(torch_cuda.split(".")[0]):
        return (
            f"nvcc {nvcc[0]}.{nvcc[1]} is of another major version than torch's CUDA {torch_cuda}; "
            f"{toolkit}, {BY_CMAKE}"
        )
    if not kept:
        return (
            f"the only cards, {', '.join(old)}, are older than 8.0, which the kernels need; "
            "TORCH_CUDA_ARCH_LIST=8.0 builds for cards of other machines"
        )
    return ""


def cuda_plan(
    wanted: str,
    torch_cuda: str | None,
    nvcc: tuple[int, int] | None,
    archs: tuple[list[str], list[str]],
    present: bool,
) -> tuple[bool, str]:
    """Whether to build the library, and what the package will have of it. `wanted`: RANDLORA_CUDA.
    `present`: there is one already; where torch cannot build it, that goes into the package.
    """
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"error: RANDLORA_CUDA={wanted!r} must be 0, 1 or unset")
    if wanted == "0":
        return False, "no CUDA kernels, because RANDLORA_CUDA=0"
    kept, old = archs
    why = why_not(torch_cuda, nvcc, kept, old)
    if not why:
        says = f"CUDA kernels by nvcc {nvcc[0]}.{nvcc[1]} for {', '.join(kept)}"
        if old:
            says += f"; left out, as older than 8.0: {', '.join(old)}"
        return True, says
    if present:
        return False, f"CUDA kernels as found in {LIBRARY}"
    if wanted == "1":
        raise SystemExit(f"error: RANDLORA_CUDA=1, but {why}")
    return False, f"no CUDA kernels: {why}"


def nvcc_version() -> tuple[int, int] | None:
    """Of the nvcc that torch calls; None if there is none that answers."""
    if CUDA_HOME is None:
        return None
    try:
        command = [f"{CUDA_HOME}/bin/nvcc", "--version"]
        said = subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:
        return None
    found = re.search(r"release (\d+)\.(\d+)", said)
    return (int(found[1]), int(found[2])) if found else None


WANTED = os.environ.get("RANDLORA_CUDA", "")
ASKED = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
NVCC = nvcc_version()
CARDS = []
if torch.cuda.is_available():
    CARDS = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
KEPT, OLD = architectures(ASKED, CARDS, NVCC or (0, 0))
WITH_CUDA, CUDA_STATUS = cuda_plan(WANTED, torch.version.cuda, NVCC, (KEPT, OLD), LIBRARY.exists())
# torch asks the cards itself, and knows which of them are too new for nvcc.
if WITH_CUDA and (OLD or not CARDS):
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(KEPT)

setup(
    version=VERSION,
    libraries=[kernel_library(isa) for isa in ISA_FLAGS],
    ext_modules=[binding(), *([cuda_kernels()] if WITH_CUDA else [])],
    cmdclass={"build_clib": BuildLibraries, "build_ext": BuildKernels},
)
