"""What auditwheel does not check: what a wheel holds, requires and uses of torch.

    python tools/check_wheel.py dist/*.whl

Exit status 1 with the findings. auditwheel, told to leave torch's libraries out, sees neither a C++
symbol of torch, which would bind the wheel to one version, nor torch in the CUDA library.
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# C++ names of torch would bind to one version; its stable C functions are called aoti_torch_...
TORCH_CPP = re.compile(r"_Z\w*(?:2at|3c10|5torch)\d")
OURS = re.compile(
    r"randlora_ext/(.*\.(py|pyi|typed)|_C\.[\w-]+\.so|librandlora_cuda\.so)|"
    r"randlora_ext-[^/]*\.dist-info/.*"
)
WANTED = ("__init__.py", "__main__.py", "py.typed", "_C.pyi", "peft/__init__.py")


def run(*command: object) -> str:
    return subprocess.check_output(list(map(str, command)), text=True)


def library_findings(path: Path) -> list[str]:
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "-dW", path))
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, needs {', '.join(needed)}")
    undefined = run("nm", "-D", "--undefined-only", path).split()
    found = [f"needs torch's C++ symbol {name}" for name in undefined if TORCH_CPP.match(name)]
    if "cuda" in path.name:  # one file serves every torch, and libcuda comes only with drivers
        found += [f"links {name}" for name in needed if re.match(r"lib(torch|c10|cu)", name)]
        defined = run("nm", "-D", "--defined-only", path).split()[2::3]
        found += [f"exports {name}" for name in defined if name != "randlora_cuda_kernels"]
    return [f"{path.name} {finding}" for finding in found]


def wheel_findings(wheel: Path) -> list[str]:
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        # auditwheel adds entries for folders.
        names = [name for name in archive.namelist() if not name.endswith("/")]
        archive.extractall(folder)
        found = [f"{name} does not belong here" for name in names if not OURS.fullmatch(name)]
        found += [f"{n} is missing" for n in WANTED if f"randlora_ext/{n}" not in names]
        (metadata,) = Path(folder).glob("*.dist-info/METADATA")
        requires = re.findall(r"^Requires-Dist: ([^;\n]*)$", metadata.read_text(), re.M)
        if requires != ["torch>=2.11"]:
            found.append(f"requires {requires} and not torch alone")
        for library in sorted(Path(folder).rglob("*.so")):
            found += library_findings(library)
    return found


if __name__ == "__main__":
    findings = wheel_findings(Path(sys.argv[1]))
    print("\n".join(findings) or "nothing unexpected")
    sys.exit(bool(findings))
