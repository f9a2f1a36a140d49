"""Builds librandlora_cuda.so with nvcc: the CUDA kernels, nothing of torch, CUDA's runtime inside.

setup.py and CMakeLists.txt build by it, and tests/cuda/compile_gate.py compiles with its flags. By
hand: `python csrc/cuda/nvcc.py librandlora_cuda.so`. It needs the standard library alone.

TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX") chooses the architectures, MAX_JOBS the number of compilers
that run at a time (default: one a processor), RANDLORA_DEBUG=1 adds line numbers.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LIBRARY = "librandlora_cuda.so"
BUILD_DIR = ROOT / "build" / "nvcc"  # stays, so that the next build compiles what has changed
FLAGS = ["-std=c++17", "-O3"]
HOST_FLAGS = ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]

OLDEST = 80  # bf16 tensor cores and cp.async begin there
ALL = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
# With its PTX that runs on everything newer too, once the driver has compiled it, and is made in a
# fraction of the time.
FEW = ["sm_80"]
FAMILIES = {
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}


class BuildError(Exception):
    pass


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME or CUDA_PATH, of PATH, or of /usr/local/cuda."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [os.path.join(home, "bin", "nvcc") for home in homes if home]
    for candidate in [*candidates, "nvcc", "/usr/local/cuda/bin/nvcc"]:
        if found := shutil.which(candidate):
            return found
    return None


def run(command: list[str]) -> subprocess.CompletedProcess:
    """Output as text; BuildError with the command and what it said where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except OSError as error:
        raise BuildError(f"{command[0]}: {error}") from None
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done


def relative(path: Path) -> str:
    """As seen from where `run` works: nvcc's link step cannot take a space in a path."""
    return os.path.relpath(path, ROOT)


def nvcc_version(nvcc: str) -> str:
    found = re.search(r"V(\d+\.\d+\.\d+)", run([nvcc, "--version"]).stdout)
    return found[1] if found else "of unknown version"


def supported(nvcc: str) -> set[str]:
    """sm_XX and compute_XX that this nvcc compiles for."""
    return set(run([nvcc, "--list-gpu-code"]).stdout.split()) | set(
        run([nvcc, "--list-gpu-arch"]).stdout.split()
    )


def parse_arch_list(text: str) -> list[str]:
    """["sm_80", "sm_90", "compute_90"] of "8.0;9.0+PTX", in torch's syntax; what is older than the
    kernels support is left out."""
    for name, meaning in FAMILIES.items():
        text = re.sub(rf"\b{name}\b", meaning, text)
    archs = []
    for word in re.split(r"[;,\s]+", text.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
        if not match:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST: {word!r} is not understood; write 8.0;9.0+PTX, or one of "
                f"{', '.join(FAMILIES)}"
            )
        number = match[1] + match[2]
        if int(number) < OLDEST:
            print(f"randlora_ext: no CUDA kernels for {word}: they begin at 8.0")
            continue
        archs.append(f"sm_{number}{match[3]}")
        if match[4]:
            archs.append(f"compute_{number}{match[3]}")
    if not archs:
        raise BuildError(f"TORCH_CUDA_ARCH_LIST={text!r} names nothing from 8.0 on")
    return list(dict.fromkeys(archs))


def architectures(nvcc: str, default: list[str] = ALL) -> list[str]:
    """Those of TORCH_CUDA_ARCH_LIST; else of `default` what nvcc knows, and the PTX of the last,
    which runs on all that is newer."""
    known = supported(nvcc)
    if text := os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip():
        archs = parse_arch_list(text)
        if unknown := [a for a in archs if a.rstrip("af") not in known]:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST={text!r}: nvcc {nvcc_version(nvcc)} does not compile for "
                f"{', '.join(unknown)}"
            )
        return archs
    archs = [a for a in default if a in known]
    if not archs:
        raise BuildError(f"nvcc {nvcc_version(nvcc)} compiles for none of {', '.join(default)}")
    return [*archs, virtual(archs[-1])]


def virtual(arch: str) -> str:
    """What nvcc's first half, which takes most of its time, compiles for. Two serve all cards: the
    kernels use nothing that came after 8.0, but for a limit of its own from 10.0 on (b_lists.cu).
    """
    shared = re.sub(r"^sm_[89]\d$", "compute_80", arch)
    shared = re.sub(r"^sm_1\d\d$", "compute_100", shared)
    return shared.replace("sm_", "compute_")


def gencode(arch: str) -> str:
    return f"-gencode=arch={virtual(arch)},code={arch}"


def headers() -> list[Path]:
    return sorted([*HERE.glob("*.h"), *(HERE.parent / "core").glob("*.h")])


def kernel_sources() -> list[Path]:
    """Largest first, so that the last to be compiled is a short one."""
    return sorted(HERE.glob("*.cu"), key=lambda path: (-path.stat().st_size, path.name))


def interface() -> str:
    """The macro that tells binding and library apart when they were made of different headers."""
    digest = hashlib.sha256()
    for header in sorted((HERE.parent / "core").glob("*.h")):
        digest.update(header.name.encode() + b"\0" + header.read_bytes())
    return f"-DRANDLORA_CUDA_INTERFACE=0x{digest.hexdigest()[:16]}u"


def make(command: list[str], output: Path, inputs: list[Path]) -> bool:
    """Runs `command` -o `output`, unless it did so already and no input has changed since."""
    stamp = output.with_name(output.name + ".command")
    text = "\n".join(command)
    if (
        output.exists()
        and stamp.exists()
        and stamp.read_text() == text
        and all(path.stat().st_mtime <= output.stat().st_mtime for path in inputs)
    ):
        return False
    stamp.unlink(missing_ok=True)
    half_made = output.with_name(f"{os.getpid()}-{output.name}")  # another build may be under way
    if warnings := run([*command, "-o", relative(half_made)]).stderr.strip():
        print(warnings)
    os.replace(half_made, output)
    stamp.write_text(text)
    return True


def build(nvcc: str, output: Path, archs: list[str], build_dir: Path | None = None) -> str:
    """Makes `output`; returns what was built in a few words, which the library knows as well."""
    description = f"nvcc {nvcc_version(nvcc)}: {' '.join(archs)}"
    version = (ROOT / "VERSION").read_text().strip()
    flags = [*FLAGS, *HOST_FLAGS]
    if os.environ.get("RANDLORA_DEBUG") == "1":
        flags += ["-g", "-lineinfo"]
    defines = [f'-DRANDLORA_VERSION="{version}"', f'-DRANDLORA_CUDA_BUILD="{description}"']
    defines.append(interface())
    build_dir = build_dir or output.parent
    build_dir.mkdir(parents=True, exist_ok=True)
    shared = headers()
    objects = []

    def compile_one(source: Path, extra: list[str]) -> None:
        started = time.monotonic()
        target = build_dir / (source.name + ".o")
        command = [nvcc, *flags, *extra, "-c", relative(source)]
        if make(command, target, [source, *shared]):
            print(f"nvcc {source.name}: {time.monotonic() - started:.1f} s", flush=True)
        objects.append(target)

    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        for _ in pool.map(lambda s: compile_one(s, [gencode(a) for a in archs]), kernel_sources()):
            pass
        for _ in pool.map(lambda s: compile_one(s, defines), sorted(HERE.glob("*.cpp"))):
            pass

    exports = HERE / "exports.map"
    link = [
        nvcc,
        "-shared",
        "-cudart",
        "static",
        "-cudadevrt",
        "none",
        "-Xlinker",
        "--no-undefined",
    ]
    # PyPI's packages of nvcc keep the runtime where nvcc itself does not look.
    lib = Path(nvcc).resolve().parent.parent / "lib"
    link += [f"-L{lib}"] if (lib / "libcudart_static.a").exists() else []
    link += ["-Xlinker", f"--version-script={relative(exports)}", *sorted(map(relative, objects))]
    output.parent.mkdir(parents=True, exist_ok=True)
    make(link, output, [*objects, exports])
    return description


def build_as_asked(torch_has_cuda: bool) -> tuple[Path | None, str]:
    """setup.py's way in: the library, None where there is none, and a few words about it.

    RANDLORA_CUDA=1 requires it and 0 leaves it out. Unset: it is built where nvcc is found; what
    nvcc cannot do is an error for a torch that could use the library, and words for one that could
    not, which then also builds for fewer cards.
    """
    wanted = os.environ.get("RANDLORA_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise BuildError(f"RANDLORA_CUDA={wanted!r} must be 0, 1 or unset")
    if wanted == "0":
        return None, "no CUDA kernels, as RANDLORA_CUDA=0 says"
    nvcc = find_nvcc()
    if nvcc is None:
        missing = "nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda)"
        if wanted == "1":
            raise BuildError(f"RANDLORA_CUDA=1, but {missing}")
        return None, f"no CUDA kernels: {missing}"
    try:
        archs = architectures(nvcc, ALL if torch_has_cuda else FEW)
        return BUILD_DIR / LIBRARY, f"CUDA kernels by {build(nvcc, BUILD_DIR / LIBRARY, archs)}"
    except BuildError as error:
        if wanted == "1" or torch_has_cuda:
            raise BuildError(f"{error}\nRANDLORA_CUDA=0 builds without CUDA kernels.") from None
        return None, f"no CUDA kernels (this torch could not use them), for nvcc failed: {error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, nargs="?", default=Path(LIBRARY))
    parser.add_argument("--build-dir", type=Path, default=BUILD_DIR)
    parser.add_argument("--few", action="store_true", help=f"by default {' '.join(FEW)} and PTX")
    parser.add_argument("--interface", action="store_true", help="print that macro and stop")
    args = parser.parse_args()
    if args.interface:
        return print(interface())
    nvcc = find_nvcc()
    if nvcc is None:
        sys.exit("nvcc was not found: set CUDA_HOME, or put it on PATH")
    try:
        built = build(
            nvcc,
            args.output.resolve(),
            architectures(nvcc, FEW if args.few else ALL),
            args.build_dir.resolve(),
        )
    except BuildError as error:
        sys.exit(f"randlora_ext: {error}")
    print(f"{args.output}: {built}")


if __name__ == "__main__":
    main()
