"""Builds randlora_ext/librandlora_cuda.so with nvcc alone: no torch, no CMake.

    python tools/cuda/cuda_library.py                    # for the cards that nvidia-smi names
    TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX" python tools/cuda/cuda_library.py

setup.py calls it. Objects lie in build/cuda and are compiled again only if their sources, the
headers, nvcc or its flags have changed. MAX_JOBS limits how many are compiled at once. CXX, or
nvcc's own variable NVCC_CCBIN, names the host compiler, and NVCC_APPEND_FLAGS adds flags.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
LIBRARY = ROOT / "randlora_ext" / "librandlora_cuda.so"
OLDEST = (8, 0)  # the kernels use its copies to shared memory, and its tensor cores for bfloat16
# Without a card and without TORCH_CUDA_ARCH_LIST: these, as far as this nvcc knows them.
USUAL = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
DRIVERS = {12: "525", 13: "580"}  # the oldest that serve a major version of CUDA


class CannotBuild(Exception):
    """One line that says why there will be no CUDA library."""


@dataclass(frozen=True)
class Architectures:
    flags: list[str]  # for nvcc
    says: str  # what they are, and what was left out


@dataclass(frozen=True)
class Plan:
    """What an installation does about the CUDA library."""

    build: bool
    says: str


# ---- decisions: functions of what was found, which tests can call anywhere -----------------------


def plan(wanted: str, torch_cuda: str | None, nvcc: str | None, present: bool) -> Plan:
    """`wanted`: RANDLORA_CUDA. `torch_cuda`: torch.version.cuda, which decides only whether the
    library is of use; nvcc may be of any other version. `present`: the library exists already.
    """
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"error: RANDLORA_CUDA={wanted!r} must be 0, 1 or unset")
    if wanted == "0":
        return Plan(False, "no CUDA kernels, because RANDLORA_CUDA=0")
    if nvcc and (wanted == "1" or torch_cuda):
        return Plan(True, f"CUDA kernels by {nvcc}")
    if present:
        return Plan(False, f"CUDA kernels as found in {LIBRARY}")
    if wanted == "1":
        raise SystemExit(
            "error: RANDLORA_CUDA=1, but nvcc was not found; install CUDA's toolkit, and set "
            "CUDA_HOME or put nvcc on PATH"
        )
    if torch_cuda:
        return Plan(
            False, "no CUDA kernels: nvcc was not found; install CUDA's toolkit and set CUDA_HOME"
        )
    return Plan(False, "no CUDA kernels: this torch has no CUDA; RANDLORA_CUDA=1 builds them")


def architectures(
    asked: str | None, cards: list[tuple[int, int]], known: list[tuple[int, int]]
) -> Architectures:
    """`asked`: TORCH_CUDA_ARCH_LIST. `cards`: compute capabilities of this machine's.
    `known`: what nvcc compiles for.
    """
    if asked:
        wanted, ptx = _parsed(asked)
    elif cards:
        wanted, ptx = _for_cards(sorted(set(cards)), known)
    else:
        wanted = [arch for arch in USUAL if arch in known]
        ptx = wanted[-1:]
    old = sorted({arch for arch in (wanted if asked else cards) if arch < OLDEST})
    wanted = [arch for arch in wanted if arch >= OLDEST]
    ptx = [arch for arch in ptx if arch >= OLDEST]
    if not wanted and not ptx:
        where = f"TORCH_CUDA_ARCH_LIST={asked!r} names" if asked else "this machine has"
        raise CannotBuild(
            f"{where} only {_names(old)}, and our kernels need {_names([OLDEST])} or newer"
        )
    flags = [f"-gencode=arch=compute_{a}{b},code=sm_{a}{b}" for a, b in wanted]
    flags += [f"-gencode=arch=compute_{a}{b},code=compute_{a}{b}" for a, b in ptx]
    says = f"for {_names(wanted)}" if wanted else "for no card directly"
    if ptx:
        says += f" and, through PTX of {_names(ptx)}, newer cards"
    if old:
        says += f"; left out: {_names(old)}, older than {_names([OLDEST])}"
    return Architectures(flags, says)


def _parsed(asked: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Architectures, and those of which PTX is wanted. 9.0a counts as 9.0: our kernels use nothing
    of what the letter adds.
    """
    wanted, ptx = [], []
    for word in re.split(r"[;\s]+", asked.strip(" ;")):
        found = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", word)
        if not found:
            raise CannotBuild(
                f"TORCH_CUDA_ARCH_LIST={asked!r}: {word!r} must be a compute capability, such as "
                "9.0 or 9.0+PTX"
            )
        arch = int(found[1]), int(found[2])
        wanted.append(arch)
        if found[3]:
            ptx.append(arch)
    return sorted(set(wanted)), sorted(set(ptx))


def _for_cards(
    cards: list[tuple[int, int]], known: list[tuple[int, int]]
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """As for `_parsed`. Cards that nvcc does not know get the PTX of the newest that it does."""
    usable = [card for card in cards if card >= OLDEST]
    wanted = [card for card in usable if card in known]
    if wanted == usable:
        return wanted, wanted[-1:]
    newest = max(known)
    return wanted, [newest]


def _names(archs: list[tuple[int, int]]) -> str:
    return ", ".join(f"sm_{a}{b}" for a, b in archs)


# ---- what this machine has -----------------------------------------------------------------------


def find_nvcc(environment: Mapping[str, str] = os.environ) -> str | None:
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    if home:
        return shutil.which(f"{home}/bin/nvcc")
    found = shutil.which("nvcc", path=environment.get("PATH"))
    return found or shutil.which("/usr/local/cuda/bin/nvcc")


def cards_here() -> list[tuple[int, int]]:
    """Compute capabilities, by the driver's own program; torch may be of another CUDA version."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [(int(a), int(b)) for a, b in re.findall(r"^(\d+)\.(\d)\s*$", said, re.M)]


def known_to(nvcc: str) -> list[tuple[int, int]]:
    said = _run([nvcc, "--list-gpu-arch"])
    return [(int(a), int(b)) for a, b in re.findall(r"compute_(\d+)(\d)\b", said)]


def version_of(nvcc: str) -> tuple[int, int]:
    found = re.search(r"release (\d+)\.(\d+)", _run([nvcc, "--version"]))
    if found is None:
        raise CannotBuild(f"{nvcc} --version names no release")
    return int(found[1]), int(found[2])


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise CannotBuild(f"{command[0]} does not start: {error}") from None
    if done.returncode:
        said = (done.stderr + done.stdout).strip()
        print(f"{shlex.join(command)}\n{said}", file=sys.stderr)
        lines = [line for line in said.splitlines() if "error" in line.lower()]
        raise CannotBuild(f"{command[0]} failed: {(lines or [said])[0].strip()}")
    return done.stdout


# ---- building ------------------------------------------------------------------------------------


def interface() -> str:
    """The number by which the binding knows a library built from the same headers of csrc/core.
    CMakeLists.txt computes it, too."""
    digests = [_digest(path) for path in sorted((CSRC / "core").glob("*.h"))]
    return f"0x{hashlib.sha256(''.join(digests).encode()).hexdigest()[:16]}u"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def build(nvcc: str, debug: bool = False) -> str:
    """Builds LIBRARY; returns what it serves, in one line. Raises CannotBuild."""
    major, minor = version_of(nvcc)
    archs = architectures(os.environ.get("TORCH_CUDA_ARCH_LIST"), cards_here(), known_to(nvcc))
    compiler = shlex.split(os.environ.get("CXX", ""))[:1]
    flags = [
        *("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"),
        *([f"-ccbin={compiler[0]}"] if compiler and "NVCC_CCBIN" not in os.environ else []),
        *(["-g", "-lineinfo"] if debug else []),
        f"-DRANDLORA_CUDA_INTERFACE={interface()}",
        *archs.flags,
    ]
    cuda = CSRC / "cuda"
    headers = sorted([*(CSRC / "core").glob("*.h"), *cuda.rglob("*.h")])
    own = [os.environ.get(name, "") for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")]
    same = [_run([nvcc, "--version"]), *flags, *own, *map(_digest, headers)]
    folder = ROOT / "build" / "cuda"
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> Path:
        key = hashlib.sha256("\0".join([*same, _digest(source)]).encode()).hexdigest()[:16]
        made = folder / f"{source.stem}-{key}.o"
        if not made.exists():
            unfinished = made.with_suffix(f".{os.getpid()}.o")
            _run([nvcc, *flags, "-c", str(source), "-o", str(unfinished)])
            unfinished.replace(made)
        return made

    sources = sorted([*cuda.rglob("*.cu"), *cuda.rglob("*.cpp")])
    # The largest first, so that the last to be compiled is a short one.
    sources.sort(key=lambda path: -path.stat().st_size)
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(compiled, source) for source in sources]
        try:
            objects = [str(job.result()) for job in running]
        except CannotBuild:
            pool.shutdown(cancel_futures=True)  # or the others would go on for minutes
            raise
    # No torch and no shared CUDA runtime: the binding opens this file at run time, so one wheel
    # serves CPU and CUDA builds of every torch.
    linked = folder / f"{LIBRARY.stem}.{os.getpid()}.so"
    exports = f"-Xlinker=--version-script={cuda / 'exports.map'},--no-undefined"
    _run([nvcc, *flags, "-shared", "-cudart=static", exports, *objects, "-o", str(linked)])
    shutil.copy(linked, LIBRARY.with_suffix(".new"))
    LIBRARY.with_suffix(".new").replace(LIBRARY)
    linked.unlink()
    driver = f"; needs driver {DRIVERS[major]} or newer" if major in DRIVERS else ""
    return f"CUDA kernels by nvcc {major}.{minor}, {archs.says}{driver}"


if __name__ == "__main__":
    nvcc = find_nvcc()
    if nvcc is None:
        sys.exit("error: nvcc was not found; set CUDA_HOME or put it on PATH")
    try:
        print(build(nvcc, debug=os.environ.get("RANDLORA_DEBUG") == "1"))
    except CannotBuild as error:
        sys.exit(f"error: {error}")
