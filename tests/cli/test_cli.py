"""The command line: arguments and help."""

import subprocess
import sys

import pytest
from cli_helpers import refused, run

import randlora_cli
import randlora_ext
from randlora_ext import diagnostics

COMMANDS = ("check", "convert", "merge")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nonsense"], "unrecognized arguments: --nonsense (see randlora --help)"),
        (["merge"], "required: MODEL, ADAPTER, OUT (see randlora merge --help)"),
        (["merge", "a", "b", "c", "--rounding", "1"], "unrecognized"),  # nothing is abbreviated
    ],
)
def test_arguments_that_make_no_command(arguments, message):
    assert message in refused(*arguments)


def test_help_fits_a_screen_and_needs_no_torch(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    program = (
        "import sys; sys.modules['torch'] = None\nfrom randlora_cli import main; main(sys.argv[1:])"
    )
    for command in ([], *([name] for name in COMMANDS)):
        shown = subprocess.run(
            [sys.executable, "-c", program, *command, "--help"], capture_output=True, text=True
        )
        assert shown.returncode == 0, shown.stderr
        lines = shown.stdout.splitlines()
        assert len(lines) <= 24 and max(map(len, lines)) <= 80
        example = lines[-1].removeprefix("example: randlora ").split()
        assert randlora_cli._parser().parse_args(example).command in (command or COMMANDS)


def test_version():
    assert run("--version") == (0, f"randlora_ext {randlora_ext.__version__}\n", "")


def test_as_a_command(tmp_path):
    command = [sys.executable, "-m", "randlora_ext", "convert", "nowhere", "out", "--to", "peft"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: nowhere")


def test_an_error_of_ours_shows_where(monkeypatch, capsys):
    monkeypatch.setattr(diagnostics, "describe", lambda: 1 // 0)
    assert randlora_cli.main([]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "please report it" in shown
