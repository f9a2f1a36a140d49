"""What a wheel holds, links and says of itself; in the manner of auditwheel, for our own rules.

    python tests/check_wheel.py dist/*.whl

Prints a summary; exit code 1 with the findings. auditwheel itself refuses a wheel that links
libtorch and does not carry it, as every extension of torch.
"""

import email.parser
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# Of glibc and gcc, which every Linux has; and of torch what its stable ABI is in.
ALLOWED = {
    "libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libgcc_s.so.1",
    "libstdc++.so.6", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1", "libtorch.so",
    "libtorch_cpu.so", "libc10.so",
}  # fmt: skip
# The CUDA library has CUDA's runtime inside and knows nothing of torch.
CUDA_ALLOWED = {name for name in ALLOWED if not re.match("libtorch|libc10", name)}
NEEDED = re.compile(r"\(NEEDED\).*\[(.+)\]")
SEARCH_PATH = re.compile(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]")
# torch's C interface: `aoti_torch_...`, `torch_...`. A C++ name of torch would bind to one version.
OF_TORCH = re.compile(r"^_Z\w*(?:2at|3c10|5torch)\d")


def link_findings(name: str, dynamic: str, undefined: list[str]) -> list[str]:
    """What is wrong with a library, from `readelf -d` and its undefined symbols."""
    allowed = CUDA_ALLOWED if "cuda" in name else ALLOWED
    found = [f"{name} links {lib}" for lib in NEEDED.findall(dynamic) if lib not in allowed]
    found += [f"{name} has the search path {path}" for path in SEARCH_PATH.findall(dynamic)]
    found += [f"{name} needs torch's C++ symbol {s}" for s in undefined if OF_TORCH.match(s)]
    return found


def inspect_library(path: Path) -> tuple[list[str], dict[str, str]]:
    """(findings, newest versions that it needs of GLIBC, GLIBCXX, CXXABI, GCC)."""
    dynamic = _run("readelf", "-dW", path)
    symbols = [line.split() for line in _run("readelf", "--dyn-syms", "-W", path).splitlines()]
    undefined = [fields[7] for fields in symbols if len(fields) > 7 and fields[6] == "UND"]
    newest: dict[str, str] = {}
    for symbol in undefined:
        if match := re.search(r"@+(GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)", symbol):
            library, version = match.groups()
            newest[library] = max(newest.get(library, "0"), version, key=_numbers)
    return link_findings(path.name, dynamic, [s.split("@")[0] for s in undefined]), newest


def content_findings(names: list[str]) -> list[str]:
    """What is missing in a wheel, and what does not belong there."""
    packages = ("randlora_ext/", "randlora_ext-")
    found = [f"{n} does not belong in the wheel" for n in names if not n.startswith(packages)]
    found += [
        f"{n} does not belong in the wheel"
        for n in names
        if n.endswith((".h", ".cpp", ".cu", ".o", ".pyc")) or "/build/" in n
    ]
    needed = (
        r"randlora_ext/__init__\.py", r"randlora_ext/py\.typed", r"randlora_ext/_C\.pyi",
        r"randlora_ext/_C\..*\.so", r"randlora_ext/peft/__init__\.py",
        r"randlora_ext/demo/__main__\.py", r"randlora_ext/cli/__init__\.py",
        r".*dist-info/licenses/LICENSE", r".*dist-info/METADATA",
    )  # fmt: skip
    return found + [
        f"the wheel lacks {pattern}"
        for pattern in needed
        if not any(re.fullmatch(pattern, n) for n in names)
    ]


def metadata_findings(text: str, version: str) -> list[str]:
    metadata = email.parser.Parser().parsestr(text)
    found = []
    if metadata["Version"] != version:
        found.append(f"Version is {metadata['Version']}, VERSION says {version}")
    extras = set(metadata.get_all("Provides-Extra", []))
    if extras != {"bench", "demo", "docs", "peft", "test"}:
        found.append(f"extras are {sorted(extras)}")
    core = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    if core != ["torch>=2.11"]:
        found.append(f"without extras it requires {core}, not torch>=2.11 alone")
    if not metadata.get_payload().startswith("# randlora_ext"):
        found.append("the description is not README.md")
    return found


def inspect_wheel(wheel: Path, version: str) -> tuple[list[str], list[str]]:
    """(findings, lines that describe it)."""
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(scratch)
        findings, lines = content_findings(names), []
        (metadata,) = Path(scratch).glob("*.dist-info/METADATA")
        findings += metadata_findings(metadata.read_text(), version)
        for library in sorted(Path(scratch).rglob("*.so")):
            found, newest = inspect_library(library)
            findings += found
            needs = ", ".join(f"{name} {version}" for name, version in sorted(newest.items()))
            size = library.stat().st_size / 1e6
            lines.append(f"{library.relative_to(scratch)}: {size:.1f} MB, needs {needs}")
    return findings, [f"{wheel.name}: {len(names)} files", *lines]


def _run(*command) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def main() -> None:
    version = (Path(__file__).resolve().parent.parent / "VERSION").read_text().strip()
    findings, lines = inspect_wheel(Path(sys.argv[1]), version)
    print("\n".join(lines))
    print("\n".join(findings) or "nothing unexpected")
    raise SystemExit(1 if findings else 0)


if __name__ == "__main__":
    main()
