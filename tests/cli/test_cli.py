"""The command line: arguments, help, and `randlora check`, which runs without arguments too."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_helpers import refused, run

import randlora_cli
import randlora_ext
from randlora_ext import diagnostics

COMMANDS = ("check", "merge", "dial")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nonsense"], "unrecognized arguments: --nonsense (see randlora --help)"),
        (["convert", "nowhere"], "invalid choice: 'convert'"),
        (["merge"], "required: MODEL, ADAPTER, OUT (see randlora merge --help)"),
        (["--vers"], "unrecognized"),  # nothing is abbreviated
    ],
)
def test_arguments_that_make_no_command(arguments, message):
    assert message in refused(*arguments)
    assert run("--version") == (0, f"randlora_ext {randlora_ext.__version__}\n", "")


def test_help_fits_a_screen_and_needs_no_torch(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    program = (
        "import sys; sys.modules['torch'] = None\nfrom randlora_cli import main; main(sys.argv[1:])"
    )
    for command in ([], *([name] for name in COMMANDS)):
        command_line = [sys.executable, "-c", program, *command, "--help"]
        shown = subprocess.run(command_line, capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr
        lines = shown.stdout.splitlines()
        assert len(lines) <= 24 and max(map(len, lines)) <= 80
        example = lines[-1].removeprefix("example: randlora ").split()
        assert randlora_cli._parser().parse_args(example).command in (command or COMMANDS)


def test_no_command_reports_and_passes():
    code, out, _ = run()
    assert code == 0, out
    for needed in (randlora_ext.__version__, torch.__version__, "CUDA kernels", "all is well"):
        assert needed in out
    assert out.count("cpu bfloat16") == 3 and str(Path(randlora_ext.__file__).parent) in out


def test_an_error_of_ours_shows_where(monkeypatch):
    monkeypatch.setattr(diagnostics, "describe", lambda: 1 // 0)
    code, out, err = run()
    assert code == 2 and out == "" and "Traceback" in err and "please report it" in err


@pytest.mark.parametrize(
    "name, wrong, told",
    [
        ("linear", lambda y: y * 1.001, "FAILED: cpu float32 hadamard"),
        ("delta_weight", lambda dW: dW * 1.001, "FAILED: cpu float32 hadamard"),
        ("generate_planes", lambda planes: planes ^ 1, "FAILED: cpu generated basis"),
    ],
)
def test_a_wrong_kernel_fails_the_check(monkeypatch, name, wrong, told):
    right = getattr(diagnostics, name)
    monkeypatch.setattr(diagnostics, name, lambda *arguments: wrong(right(*arguments)))
    code, out, _ = run("check")
    assert code == 1 and told in out
