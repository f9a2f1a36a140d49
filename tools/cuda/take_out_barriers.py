"""Is every barrier of the kernels needed, and would the execution gate see that it is missing?

    cmake -S . -B build-tsan -DRANDLORA_SANITIZE=thread && cmake --build build-tsan -j2
    python tools/cuda/take_out_barriers.py [a_down.cu ...]         # some files; default: all

Takes each __syncthreads, __syncwarp and cp_async_wait out of csrc/cuda, one at a time, links the
tests in build-tsan with that, and runs them: one of them must fail. Half a minute each on an idle
core. Exit status 1 if a change went unseen.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = ROOT / "build-tsan"
WAIT = re.compile(r"^\s*(__syncthreads\(\)|__syncwarp\(\)|cp_async_wait<.*>\(\));", re.MULTILINE)
TESTS = {  # test_NAME.cpp of the execution gate, and the kernels that it runs
    "a_side": ("a_*.cu", "panels.cu"),
    "b_side": ("b_lists.cu", "b_planes.cu"),
    "basis_gpu": ("fill_planes.cu", "lists.cu", "dense.cu"),
    "delta": ("delta_lists*.cu", "delta_planes*.cu", "delta_codes.cu"),
    "hadamard": ("hadamard_*.cu",),
    "scaled_basis": ("scaled_basis.cu",),
}
FLAGS = ["-std=gnu++17", "-O1", "-g", "-fPIC", "-fsanitize=thread", "-Wno-unknown-pragmas"]


def run(*command: object, **more) -> subprocess.CompletedProcess:
    return subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more
    )


def must(*command: object) -> None:
    if (done := run(*command)).returncode:
        sys.exit(done.stdout)


def users(header: str, folder: Path) -> list[str]:
    """The .cu files that include `header`, also by way of others."""
    found = []
    for path in sorted(folder.rglob("*.*")):
        if path.suffix in (".cu", ".h") and re.search(
            rf'#include "([./\w]*/)?{header}"', path.read_text()
        ):
            found += [path.name] if path.suffix == ".cu" else users(path.name, folder)
    return sorted(set(found))


def find(csrc: Path, name: str) -> Path:
    return next((csrc / "cuda").rglob(name))


def seen(sources: list[str], csrc: Path, work: Path) -> str | None:
    """The test that fails with `sources` as they stand in `csrc`; None if all pass."""
    for test, patterns in TESTS.items():
        mine = [name for name in sources if any(fnmatch(name, p) for p in patterns)]
        if not mine:
            continue
        objects = []
        for name in mine:
            objects.append(work / f"{name}.o")
            include = [f"-I{p}" for p in (csrc, *(ROOT / "tests" / d for d in ("cuda_on_cpu",)))]
            must("g++", *FLAGS, *include, "-xc++", "-c", find(csrc, name), "-o", objects[-1])
        program = work / "test"
        main = BUILD / f"CMakeFiles/test_cuda_{test}.dir/tests/cuda/test_{test}.cpp.o"
        libraries = [BUILD / "librandlora_cuda_on_cpu.a", BUILD / "librandlora_kernels.a"]
        must("g++", "-fsanitize=thread", main, *objects, *libraries, "-o", program, "-pthread")
        options = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
        if run(program, env=options, timeout=1800).returncode:
            return test
    return None


def main() -> int:
    kernels = (ROOT / "csrc" / "cuda").rglob("*.*")
    names = sys.argv[1:] or sorted(p.name for p in kernels if p.suffix in (".cu", ".h"))
    unseen = 0
    for name in names:
        text = find(ROOT / "csrc", name).read_text()
        for place in WAIT.finditer(text):
            with tempfile.TemporaryDirectory() as temporary:
                csrc = Path(temporary) / "csrc"
                shutil.copytree(ROOT / "csrc", csrc)
                find(csrc, name).write_text(
                    text[: place.start(1)] + text[place.end() :]  # with its semicolon
                )
                sources = [name] if name.endswith(".cu") else users(name, csrc / "cuda")
                test = seen(sources, csrc, Path(temporary))
            line = text.count("\n", 0, place.start(1)) + 1
            print(f"{name}:{line}: {place[1]}: {test or 'UNSEEN'}", flush=True)
            unseen += test is None
    print(f"{unseen} went unseen")
    return unseen > 0


if __name__ == "__main__":
    sys.exit(main())
