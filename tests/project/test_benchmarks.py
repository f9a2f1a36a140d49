"""The benchmark programs at toy size: what they write and what they draw."""

import json
import re
from pathlib import Path

import approximate
import budget
import checkpoint
import forgetting
import layer
import model_step
import plots
import pytest
import record
from methods import METHODS

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("stock_peft")


SMALL = "--sizes 48x64 --tokens 4 --repeats 1 --densities"
RUNS = [  # of each row these columns are positive
    (layer, f"{SMALL} 0.2 --methods all", 1, METHODS),
    (layer, f"{SMALL} hadamard --dtype bf16 --append --methods ours", 1, ["ours"]),
    (approximate, "--size 32 --ranks 4,16 --steps 150 --seeds 1 --bases 1/3,hadamard", 12,
     ["randlora", "parameters"]),
    (model_step, "--shape toy --batch 1 --tokens 4 --repeats 1 --methods lora,ours|0.07,"
                 "ours|hadamard,peft|very_sparse", 4, ["over_first", "trained", "peak_mib"]),
]  # fmt: skip


@pytest.mark.parametrize(
    "module, line, count, positive", RUNS, ids=lambda v: getattr(v, "__name__", "")
)
def test_what_is_measured_is_written(tmp_path, monkeypatch, module, line, count, positive):
    # The server that forks each measurement would import for seconds.
    for each in (layer, model_step, record):
        monkeypatch.setattr(each, "in_a_process", lambda function, *a, **k: function(*a, **k))
    out = tmp_path / "results"
    module.main([*(word.replace("|", " ") for word in line.split()), "--out", str(out)])
    found = json.loads(out.with_suffix(".json").read_text())
    about = {"date", "cpu", "threads", "torch", "peft", "commit", "version", "isa"}
    assert about <= set(found["machine"]) and len(found["rows"]) == count
    assert all(row[column] > 0 for row in found["rows"] for column in positive)


def test_the_numbers_of_the_pages_are_those_of_the_programs(capsys):
    lora, stock, ours = checkpoint.sizes().values()
    assert round(lora / 1e6) == round(ours / 1e6) == 37 and round(stock / 1e9, 1) == 2.2
    budget.main([])
    printed = capsys.readouterr().out
    page = (ROOT / "docs" / "distributed.md").read_text().split("## What it takes")[1]
    numbers = re.findall(r"[\d.]+ [kMGT]B", page)
    assert len(numbers) >= 9 and all(number in printed for number in numbers)


@pytest.mark.skipif(not (ROOT / "benchmarks/results").is_dir(), reason="an sdist has no results")
def test_plots_are_drawn_from_the_results_and_shown(tmp_path):
    plots.main(["--out", str(tmp_path)])
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {path.name for path in (ROOT / "docs" / "figures").glob("*.png")}
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "".join(page.read_text() for page in pages)
    assert all(f"figures/{name}" in text for name in drawn)


@pytest.mark.skipif(not (ROOT / "benchmarks/results").is_dir(), reason="an sdist has no results")
def test_forgetting_is_told_from_the_results(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["forgetting.py", "zen5"])
    forgetting.main()
    page = (ROOT / "docs" / "density.md").read_text()
    told = [line for line in capsys.readouterr().out.splitlines() if "MLP alone |" in line]
    assert len(told) > 3
    for line in told[:1]:  # what the page says is what the rows say
        numbers = re.findall(r"\d\.\d{3} \(\d\)", line)
        assert len(numbers) == 8 and all(number in page for number in numbers)
