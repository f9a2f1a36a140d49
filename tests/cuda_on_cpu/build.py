"""Builds librandlora_cuda_on_cpu.so: the CUDA library, its kernels compiled by g++ for the CPU.

    python tests/cuda_on_cpu/build.py [output]

With RANDLORA_CUDA_LIBRARY=output RANDLORA_CUDA_SERVES_CPU=1 every operator on CPU tensors then runs
through the CUDA binding and the CUDA kernels (docs/cuda-on-cpu.md). Only what changed is compiled.
"""

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT / "csrc" / "cuda"))
import nvcc  # noqa: E402

OUTPUT = ROOT / "build" / "cuda_on_cpu" / "librandlora_cuda_on_cpu.so"
# -O1: the time of a test goes into switching fibers.
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
FLAGS += ["-Icsrc", "-Itests/cuda_on_cpu"]


def build(output: Path = OUTPUT, more_sources: tuple[Path, ...] = ()) -> Path:
    """Makes `output`, with its objects beside it; nvcc.BuildError says what the compiler said."""
    cxx = os.environ.get("CXX", "g++")
    output.parent.mkdir(parents=True, exist_ok=True)
    version = (ROOT / "VERSION").read_text().strip()
    defines = [f'-DRANDLORA_VERSION="{version}"', nvcc.interface()]
    defines.append(f'-DRANDLORA_CUDA_BUILD="{cxx}, on the CPU"')
    headers = [*nvcc.headers(), *HERE.glob("*.h")]
    hosts = [nvcc.HERE / "table.cpp", HERE / "context_on_cpu.cpp"]

    def compile_one(source: Path) -> Path:
        target = output.parent / (source.name + ".o")
        language = ["-xc++"] if source.suffix == ".cu" else defines
        nvcc.make([cxx, *FLAGS, *language, "-c", nvcc.relative(source)], target, [source, *headers])
        return target

    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(compile_one, [*nvcc.kernel_sources(), *hosts, *more_sources]))
    exports = nvcc.HERE / "exports.map"
    link = [cxx, "-shared", "-Wl,--no-undefined", f"-Wl,--version-script={nvcc.relative(exports)}"]
    nvcc.make([*link, *sorted(map(nvcc.relative, objects)), "-pthread"], output, objects)
    return output


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, nargs="?", default=OUTPUT)
    try:
        print(build(parser.parse_args().output.resolve()))
    except nvcc.BuildError as error:
        sys.exit(str(error))
