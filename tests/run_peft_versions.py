"""The tests of the PEFT integration under several versions of PEFT, and a table of the outcome.

    python tests/run_peft_versions.py                       # oldest supported to newest
    python tests/run_peft_versions.py 0.18.1 0.21.2 -- -x   # some; pytest's options after --

Each version gets a small virtual environment that sees this one's packages and has its own PEFT in
front of them. An entry adds packages by +:
"0.18.1+transformers==4.57.6+tokenizers==0.22.2+huggingface-hub==0.36.0".
"""

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("0.18.0", "0.18.1", "0.19.0", "0.19.1", "0.20.0", "0.21.0", "0.21.1", "0.21.2")


def make_environment(folder: Path, requirements: list[str]) -> Path:
    """The Python of a new environment on top of this one."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin/python"
    paths = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", paths))
    # Not a plain path: also the .pth files there count, as that of an editable install.
    site.joinpath("outer.pth").write_text(
        f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    )
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q"]
    subprocess.run([*pip, "--no-deps", *requirements], check=True)
    return python


def run_tests(python: Path, files: list[str], options: list[str]) -> str:
    """pytest's last line, after its output."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [str(python), "-m", "pytest", "-q", "-rfE", "-W", "ignore", "-o", "addopts="]
    command += ["-p", "no:cacheprovider", *files, *options]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    return last if process.wait() in (0, 1) else f"exit status {process.returncode}: {last}"


def main() -> None:
    arguments, _, options = " ".join(sys.argv[1:]).partition("--")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("versions", nargs="*", default=VERSIONS, metavar="VERSION")
    chosen = parser.parse_args(arguments.split()).versions
    files = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/test_peft*.py"))
    table = {}
    with tempfile.TemporaryDirectory() as scratch:
        for version in chosen:
            print(f"\n=== PEFT {version}", flush=True)
            peft, *others = version.split("+")
            started = time.monotonic()
            python = make_environment(Path(scratch) / version, [f"peft=={peft}", *others])
            table[version] = run_tests(python, files, options.split())
            print(f"{time.monotonic() - started:.0f} s", flush=True)
    print("\n| PEFT | outcome |\n|---|---|")
    for version, outcome in table.items():
        print(f"| {version} | {outcome} |")
    if not all(re.match(r"\d+ passed", outcome) for outcome in table.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
