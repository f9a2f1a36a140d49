"""The version, and what the build refuses."""

import runpy
import shutil
from pathlib import Path

import pytest
import setuptools
import torch

import randlora_ext
from randlora_ext import _C

ROOT = Path(__file__).resolve().parents[2]


def test_version():
    version = (ROOT / "VERSION").read_text().strip()
    assert randlora_ext.__version__ == version == _C.build_info()["version"]


# The last one at once, whatever an earlier build has left.
@pytest.mark.parametrize(
    "cuda, compiler, says",
    [
        ("1", "c++", "RANDLORA_CUDA=1, but this torch has no CUDA"),
        ("yes", "c++", "must be 0, 1 or unset"),
        ("0", "no-such-compiler", "error: there is no C\\+\\+ compiler 'no-such-compiler'"),
    ],
)
def test_the_build_refuses_what_it_cannot_build(cuda, compiler, says, tmp_path, monkeypatch):
    if cuda == "1" and torch.version.cuda:
        pytest.skip("this torch has CUDA")
    for name in ("setup.py", "VERSION"):  # away from a library that this checkout may have
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANDLORA_CUDA", cuda)
    monkeypatch.setenv("CXX", compiler)
    build = lambda **given: setuptools.Distribution(given).run_command("build_ext")  # noqa: E731
    monkeypatch.setattr(setuptools, "setup", build)
    with pytest.raises(SystemExit, match=says):
        runpy.run_path("setup.py")
