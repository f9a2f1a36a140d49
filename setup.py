"""Builds randlora_ext._C, which is torch-free kernel libraries, one per instruction set, and the
binding; and beside it librandlora_cuda.so (csrc/cuda/nvcc.py), where nvcc is found.

The kernels are compiled several times with different -m flags; setuptools' `libraries` (build_clib)
is what allows flags per source set. The binding uses torch's stable ABI, so that one built file
loads under torch 2.11 and later.

RANDLORA_DEBUG=1 builds with -O0 -g.
RANDLORA_SANITIZE=address,undefined (or thread) puts -fsanitize= into CPU kernels and binding;
tests/run_sanitized_python.sh tells what else that takes.
RANDLORA_CUDA=1 requires the CUDA kernels, 0 leaves them out; TORCH_CUDA_ARCH_LIST chooses cards.
"""

import os
import platform
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import torch
from setuptools import setup
from setuptools.command.build_clib import build_clib
from torch.utils.cpp_extension import BuildExtension, CppExtension

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "csrc" / "cuda"))
import nvcc  # noqa: E402

VERSION = (HERE / "VERSION").read_text().strip()
OPTIMISE = ["-O0", "-g"] if os.environ.get("RANDLORA_DEBUG") == "1" else ["-O3", "-g0"]
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

KERNEL_HEADERS = sorted(
    str(p.relative_to(HERE)) for d in ("core", "cpu") for p in (HERE / "csrc" / d).glob("*.h")
)


def kernel_library(isa: str) -> tuple[str, dict]:
    source = f"csrc/cpu/isa_{isa}.cpp"
    return f"randlora_{isa}", {
        "sources": [source],
        "obj_deps": {"": KERNEL_HEADERS, source: []},
        "cflags": [*COMMON, *ISA_FLAGS[isa]],
    }


class BuildLibraries(build_clib):
    """Side by side: that for AVX-512 alone takes as long as the others together."""

    def build_libraries(self, libraries):
        build_one = super().build_libraries
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda library: build_one([library]), libraries))


class BuildKernels(BuildExtension):
    def run(self):
        # `build_ext --inplace` and editable installs do not run build_clib by themselves.
        self.run_command("build_clib")
        super().run()
        try:
            library, about = nvcc.build_as_asked(torch.version.cuda is not None)
        except nvcc.BuildError as error:
            raise SystemExit(f"randlora_ext: {error}") from None
        in_package = f"randlora_ext/{nvcc.LIBRARY}"
        targets = [Path(self.build_lib) / in_package]
        if self.inplace:
            targets.append(HERE / in_package)
        for target in targets:
            target.unlink(missing_ok=True)  # one of an earlier build would not fit this binding
            if library is not None:
                shutil.copy2(library, target)
        print(f"randlora_ext {VERSION}: built CPU kernels for {', '.join(ISA_FLAGS)}; {about}")


def extension():
    sources = [f"csrc/cpu/{name}.cpp" for name in ("balanced", "dispatch", "packing")]
    sources += ["csrc/python/module.cpp"]
    sources += sorted(str(p.relative_to(HERE)) for p in (HERE / "csrc" / "torch").glob("*.cpp"))
    ext = CppExtension(
        "randlora_ext._C",
        sources,
        include_dirs=[pybind11.get_include()],
        depends=[
            *KERNEL_HEADERS,
            *(f"csrc/torch/{h}.h" for h in ("backend", "common", "delta_weight")),
        ],
        extra_compile_args=[
            *COMMON,
            "-DTORCH_TARGET_VERSION=0x020b000000000000",  # 2.11, the oldest that is supported
            f'-DRANDLORA_VERSION="{VERSION}"',
            nvcc.interface(),
        ],
        extra_link_args=SANITIZE,
    )
    # Nothing of torch's Python binding is used: the file depends on the stable ABI alone.
    ext.libraries = [name for name in ext.libraries if name != "torch_python"]
    return ext


setup(
    version=VERSION,
    libraries=[kernel_library(isa) for isa in ISA_FLAGS],
    ext_modules=[extension()],
    cmdclass={"build_clib": BuildLibraries, "build_ext": BuildKernels},
)
