"""`python -m randlora_ext`."""

import subprocess
import sys

import pytest
import torch

import randlora_ext
from randlora_ext import __main__ as program
from randlora_ext import diagnostics


def test_the_command_reports_and_passes():
    run = subprocess.run([sys.executable, "-m", "randlora_ext"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    for needed in (randlora_ext.__version__, torch.__version__, "CUDA kernels", "all is well"):
        assert needed in run.stdout
    assert run.stdout.count("cpu bfloat16") == 2


def test_overrides_are_named(monkeypatch):
    monkeypatch.setenv("RANDLORA_PATH", "delta")
    assert any("RANDLORA_PATH=delta" in line for line in diagnostics.describe())


def test_a_wrong_kernel_fails_the_check(monkeypatch, capsys):
    right = diagnostics.linear
    monkeypatch.setattr(diagnostics, "linear", lambda *a: right(*a) * 1.001)
    assert program.main() == 1
    assert "FAILED: cpu float32 factored" in capsys.readouterr().out


@pytest.mark.parametrize("error", [RuntimeError("no kernel"), ValueError("bad")])
def test_a_check_that_cannot_run_fails(monkeypatch, capsys, error):
    def broken(*arguments):
        raise error

    monkeypatch.setattr(diagnostics, "linear", broken)
    assert program.main() == 1
    assert "could not run" in capsys.readouterr().out
