"""The command line: which options go together, and `--bench`."""

import subprocess
import sys

import pytest
from cli_helpers import refused

from randlora_ext import diagnostics
from randlora_ext.cli import bench, main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nonsense"], "unrecognized"),
        (["--inspect"], "expected one argument"),
        (["--merge", "a", "b"], "expected 3 arguments"),
        (["--inspect", "a", "--bench"], "not allowed with"),
        (["--plot", "a.png"], "--plot goes with --inspect"),
        (["--to", "peft"], "--to goes with --convert"),
        (["--convert", "a", "b"], "--convert needs --to peft or --to compact"),
        (["--bench", "--rounding-seed", "1"], "--rounding-seed goes with --merge"),
        (["--merge", "a", "b", "c", "--base", "x"], "--base goes with --inspect or --convert"),
        (["--merge", "a", "b", "c", "--rounding-seed", "x"], "invalid int"),
        (["--convert", "a", "b", "--to", "lora"], "invalid choice"),
    ],
)
def test_what_does_not_go_together(arguments, message):
    assert message in refused(*arguments)


def test_as_a_command(tmp_path):
    command = [sys.executable, "-m", "randlora_ext", "--plot", "a.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: --plot goes with --inspect")


def test_an_error_of_ours_shows_where(monkeypatch, capsys):
    monkeypatch.setattr(diagnostics, "describe", lambda: 1 // 0)
    assert main([]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "please report it" in shown


def test_bench_at_a_small_size(stock_peft, one_thread, capsys):
    rows = [((64, 96), 8, "very_sparse"), ((64, 64), 8, "1/3")]
    assert bench.bench(rows=rows) == 0
    lines = capsys.readouterr().out.splitlines()
    for size, density in (("64 x 96", "very_sparse"), ("64 x 64", "1/3")):
        (line,) = (line for line in lines if size in line)
        frozen, _, lora, peft, ours = line.split()[5:]
        assert density in line and min(map(float, (frozen, lora, peft, ours))) > 0


def test_bench_ends_with_the_minute(stock_peft, one_thread, capsys):
    assert bench.bench(seconds=-1) == 0
    assert "7 larger layers were left out" in capsys.readouterr().out


def test_a_wrong_result_is_not_timed(monkeypatch, stock_peft):
    right = diagnostics.linear
    monkeypatch.setattr(diagnostics, "linear", lambda *a: right(*a) * 1.001)
    with pytest.raises(RuntimeError, match="verification failed"):
        bench.bench(rows=[((64, 64), 8, "0.07")])
