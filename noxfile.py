"""The test suite with other versions of torch and of PEFT. Needs nox (pip install nox).

nox -l                                      lists the sessions
nox -s torch                                one wheel with each torch; those of PyPI take 3 GB each
nox -s "peft(version='0.18.1')" -- -x       one PEFT; what follows -- goes to pytest
"""

import os
from pathlib import Path

import nox

ROOT = Path(__file__).parent
nox.options.default_venv_backend = "venv"


@nox.session
def wheel(session: nox.Session) -> None:
    """Builds dist/*.whl."""
    session.install("build")
    session.run("python", "-m", "build", "--wheel")


@nox.session(requires=["wheel"])
@nox.parametrize("version", ["==2.11.0", "==2.13.0", ">=2.13"])
def torch(session: nox.Session, version: str) -> None:
    """The whole suite."""
    session.env["PIP_CONFIG_FILE"] = os.devnull  # a machine's configuration may cap torch
    test(session, f"torch{version}", "tests")


@nox.session(requires=["wheel"])
@nox.parametrize(
    "version", ["0.18.0", "0.18.1", "0.19.0", "0.19.1", "0.20.0", "0.21.0", "0.21.1", "0.21.2"]
)
def peft(session: nox.Session, version: str) -> None:
    """The tests of the integration."""
    files = sorted(ROOT.glob("tests/peft/test_*.py"))
    test(session, f"peft=={version}", *files)


def test(session: nox.Session, requirement: str, *tests: str | Path) -> None:
    """Runs tests of this checkout on the wheel, in a folder from which only the wheel is found."""
    newest = max(ROOT.glob("dist/*.whl"), key=os.path.getmtime)
    session.install(f"{newest}[test]", requirement)
    session.chdir(session.create_tmp())
    session.run("pytest", "-W", "ignore", *(str(ROOT / path) for path in tests), *session.posargs)
