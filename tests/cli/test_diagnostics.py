"""`randlora check`, which `python -m randlora_ext` alone runs too."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import randlora_ext
from randlora_cli import main
from randlora_ext import diagnostics


def test_the_command_reports_and_passes():
    run = subprocess.run([sys.executable, "-m", "randlora_ext"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    for needed in (randlora_ext.__version__, torch.__version__, "CUDA kernels", "all is well"):
        assert needed in run.stdout
    assert run.stdout.count("cpu bfloat16") == 3
    assert str(Path(randlora_ext.__file__).parent) in run.stdout


def test_overrides_are_named(monkeypatch):
    names = "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "RANDLORA_MISSPELT", "RANDLORA_PATH"
    for name in names:
        monkeypatch.setenv(name, "0")
    (line,) = (line for line in diagnostics.describe() if line.startswith("environment:"))
    told = line.removeprefix("environment: ").split(", ")  # torch may set others, such as KMP_...
    assert [each for each in told if each.endswith("=0") and each[:-2] in names] == [
        f"{name}=0" for name in names
    ]


def test_a_wrong_kernel_fails_the_check(monkeypatch, capsys):
    right = diagnostics.linear
    monkeypatch.setattr(diagnostics, "linear", lambda *a: right(*a) * 1.001)
    assert main(["check"]) == 1
    assert "FAILED: cpu float32 hadamard factored" in capsys.readouterr().out


def test_wrong_bases_fail_the_check(monkeypatch, capsys):
    right = diagnostics.generate_planes
    monkeypatch.setattr(diagnostics, "generate_planes", lambda *a: right(*a) ^ 1)
    assert main(["check"]) == 1
    assert "FAILED: cpu generated basis" in capsys.readouterr().out


def test_the_known_answer_is_that_of_the_specification():
    known = (Path(__file__).parents[1] / "data" / "basis_v1.txt").read_text().splitlines()
    seed, role, row, rows, column, columns, density = diagnostics._SLICE
    line = ("planes", seed, role, row, column, rows, columns, density, diagnostics._DIGEST)
    assert " ".join(map(str, line)) in known


@pytest.mark.parametrize("error", [RuntimeError("no kernel"), ValueError("bad")])
def test_a_check_that_cannot_run_fails(monkeypatch, capsys, error):
    def broken(*arguments):
        raise error

    monkeypatch.setattr(diagnostics, "linear", broken)
    assert main(["check"]) == 1
    assert "could not run" in capsys.readouterr().out
