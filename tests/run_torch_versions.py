"""One wheel under several versions of torch: the test suite in each, and a table of the outcome.

    python tests/run_torch_versions.py                        # 2.11.0, 2.13.0 and PyPI's newest
    python tests/run_torch_versions.py 2.12.1 -- -x           # some; pytest's options after --
    python tests/run_torch_versions.py /venvs/torch-2.12      # an environment that has a torch
    python tests/run_torch_versions.py --wheel dist/X.whl     # a wheel that exists already

The wheel is built once, by `python -m build` against this environment's torch (pip install build).
Every version gets a fresh virtual environment with nothing of this one in it, the wheel with its
extra `test`, and a folder that holds the tests alone, so that only the installed wheel is found. A
version is what pip takes: "2.11.0" gives PyPI's CUDA build (3 GB); "newest" is no version. An
environment that is named by its folder gets the wheel installed, keeps its torch, and stays.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("2.11.0", "2.13.0", "newest")
# Tests of files that are in a checkout and not in a wheel.
NEED_CHECKOUT = ("docs", "examples", "gpu_run", "every_kernel", "packaging", "typing")
# Where a machine caps torch in pip's configuration, other versions are asked for by name here.
WITHOUT_CONFIGURATION = {"PIP_CONFIG_FILE": os.devnull, "PIP_CONSTRAINT": ""}


def build_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(folder)]
    subprocess.run([*command, str(ROOT)], check=True, stdout=subprocess.DEVNULL)
    (wheel,) = folder.glob("*.whl")
    return wheel


def make_environment(folder: Path, version: str, wheel: Path) -> Path:
    """The Python of a new environment with that torch and the wheel with the extra `test`."""
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin/python"
    pip_install(python, "torch" if version == "newest" else f"torch=={version}", f"{wheel}[test]")
    return python


def use_environment(folder: Path, wheel: Path) -> Path:
    """The same of an environment that has a torch, and perhaps an older wheel of this version."""
    python = folder / "bin/python"
    torch = ask(python, "import torch; print(torch.__version__.split('+')[0])", folder)
    pip_install(python, f"torch=={torch}", f"{wheel}[test]")  # the installed one, of any +build
    pip_install(python, "--force-reinstall", "--no-deps", str(wheel))
    return python


def pip_install(python: Path, *what: str) -> None:
    command = [str(python), "-m", "pip", "install", "-q", *what]
    subprocess.run(command, check=True, env=os.environ | WITHOUT_CONFIGURATION)


def copy_tests(folder: Path) -> None:
    """tests/ without what needs a checkout."""
    folder.mkdir()
    for path in (ROOT / "tests").glob("*.py"):
        if not (path.name.startswith("test_") and any(part in path.name for part in NEED_CHECKOUT)):
            shutil.copy2(path, folder)
    shutil.copytree(ROOT / "tests/data", folder / "data")


def ask(python: Path, statement: str, folder: Path) -> str:
    """What a statement prints."""
    command = [str(python), "-W", "ignore", "-c", statement]
    return subprocess.run(
        command, cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def run_tests(python: Path, folder: Path, options: list[str]) -> tuple[bool, str]:
    """(whether all passed, pytest's last line), after its output."""
    command = [str(python), "-m", "pytest", "-q", "-rfE", "-W", "ignore"]
    command += ["-p", "no:cacheprovider", *options]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    return process.wait() == 0, last


def main() -> None:
    arguments, options = sys.argv[1:], []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, options = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("versions", nargs="*", default=VERSIONS, metavar="VERSION")
    parser.add_argument("--wheel", type=Path)
    chosen = parser.parse_args(arguments)
    rows, passed = [], []
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        wheel = chosen.wheel.resolve() if chosen.wheel else build_wheel(scratch / "dist")
        copy_tests(scratch / "tests")
        for version in chosen.versions:
            print(f"\n=== torch {version}", flush=True)
            started = time.monotonic()
            if exists := Path(version, "bin/python").exists():
                environment = Path(version).resolve()
                python = use_environment(environment, wheel)
            else:
                environment = scratch / version
                python = make_environment(environment, version, wheel)
            found = ask(python, "import torch; print(torch.__version__)", scratch)
            place = ask(python, "import randlora_ext; print(randlora_ext.__file__)", scratch)
            if not Path(place).is_relative_to(environment):
                raise SystemExit(f"not the installed wheel, but {place}")
            good, outcome = run_tests(python, scratch / "tests", options)
            passed.append(good)
            rows.append(f"| {found} | {outcome} | {time.monotonic() - started:.0f} s |")
            if not exists:
                shutil.rmtree(environment)
        print(f"\n{wheel.name}, built with torch {built_with()}\n")
    print("| torch | outcome | with installing |\n|---|---|---|", *rows, sep="\n")
    raise SystemExit(0 if all(passed) else 1)


def built_with() -> str:
    import torch

    return torch.__version__


if __name__ == "__main__":
    main()
