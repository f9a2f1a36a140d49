"""The benchmark programs at toy size: what they write and what they draw."""

import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import approximate
import budget
import calibrate
import checkpoint
import layer
import metamath
import model_step
import pages
import peft
import plots
import pytest
import record
import torch
from language_models import llama
from methods import METHODS
from peft_helpers import are_calibrated
from PIL import Image

import randlora_ext.peft

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("stock_peft")


SMALL = "--sizes 48x64 --tokens 4 --repeats 1 --densities"
RUNS = [  # of each row these columns are positive
    (layer, f"{SMALL} 0.2 --methods all", 1, METHODS),
    (layer, f"{SMALL} hadamard --dtype bf16 --append --methods ours", 1, ["ours"]),
    (approximate, "--size 32 --ranks 4,16 --steps 150 --seeds 1 --bases 1/3,hadamard", 12,
     ["randlora", "parameters"]),
    (calibrate, "--shape toy --tokens 4,9 --repeats 1", 4,
     ["step_s", "calibrate_s", "in_steps", "step_mib", "calibrate_mib"]),
    (model_step, "--shape toy --batch 1 --tokens 4 --repeats 1 --methods lora,ours|0.07,"
                 "ours|hadamard,peft|very_sparse", 4, ["over_first", "trained", "peak_mib"]),
]  # fmt: skip


@pytest.mark.parametrize(
    "module, line, count, positive", RUNS, ids=lambda v: getattr(v, "__name__", "")
)
def test_what_is_measured_is_written(tmp_path, monkeypatch, module, line, count, positive):
    # The server that forks each measurement would import for seconds.
    for each in (calibrate, layer, model_step, record):
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
    page = (ROOT / "docs" / "benchmarks.md").read_text().split("## A large model")[1]
    numbers = re.findall(r"[\d.]+ [kMGT]B", page)
    assert len(numbers) >= 9 and all(number in printed for number in numbers)


@pytest.mark.skipif(not (ROOT / "benchmarks/results").is_dir(), reason="an sdist has no results")
def test_plots_are_drawn_from_the_results_and_shown(tmp_path):
    plots.main(["--out", str(tmp_path)])
    drawn = results_of_figures(tmp_path)
    assert drawn == results_of_figures(ROOT / "docs" / "figures")
    told = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "".join(page.read_text() for page in told)
    assert all(f"figures/{name}" in text for name in drawn)


def results_of_figures(folder):
    """The digest of the results that each was drawn from."""
    return {path.name: Image.open(path).text["Results"] for path in folder.glob("*.png")}


@pytest.mark.skipif(not (ROOT / "benchmarks/results").is_dir(), reason="an sdist has no results")
@pytest.mark.parametrize("name, count", [("evidence", 19), ("ablations", 9)])
def test_a_page_has_the_tables_that_its_program_prints(name, count):
    page = (ROOT / "docs" / f"{name}.md").read_text()
    assert page.count("<!-- table: ") == count
    assert pages.filled(page, pages.printed(pages.PROGRAMS[name])) == page


def test_a_table_is_written_again_below_its_comment():
    page = "a\n\n<!-- table: new -->\n\n{}b\n\n| other |\n|---|\n"
    old, new = "| x |\n|---|\n", "| x | y |\n|---|---|\n| 1 | 2 |\n"
    for before in ("", old, f"{old}\n"):
        assert pages.filled(page.format(before), {"new": new}) == page.format(f"{new}\n")


@pytest.mark.skipif(not (ROOT / "benchmarks/results").is_dir(), reason="an sdist has no results")
def test_the_table_names_every_result_and_programs_that_exist():
    table = (ROOT / "benchmarks" / "README.md").read_text()
    results = {path.name for path in (ROOT / "benchmarks" / "results").iterdir()}
    assert set(re.findall(r"[\w-]+\.jsonl?", table)) == results
    programs = re.findall(r"python (\w+\.py)", table)
    assert all((ROOT / "benchmarks" / name).exists() for name in programs)


RUNNER = """
import os
import random

def main(path_experiment):
    # load configs
    config = peft.PeftConfig.from_pretrained(path_experiment)
    model = peft.get_peft_model(base, config)
    print_verbose(model)
    return model
"""


class Rows:
    """As of a data set: a slice gives columns."""

    def __getitem__(self, rows: slice) -> dict:
        lengths = [2 + i % 3 for i in range(rows.start, rows.stop)]
        ids = [list(range(1, length + 1)) for length in lengths]
        return {"input_ids": ids, "attention_mask": [[1] * length for length in lengths]}


def pad(columns: dict, return_tensors: str) -> dict:
    pad_all = torch.nn.utils.rnn.pad_sequence
    return {name: pad_all([*map(torch.tensor, rows)], True) for name, rows in columns.items()}


def test_pefts_runner_gets_a_hook_and_a_row(tmp_path):
    """Of a runner with the same lines, on a tiny model."""
    run = tmp_path / "method_comparison" / "MetaMathQA" / "run.py"
    run.parent.mkdir(parents=True)
    run.write_text(RUNNER)
    metamath.main([str(tmp_path)])
    changed = run.read_text()
    with pytest.raises(FileExistsError):
        metamath.main([str(tmp_path)])
    assert run.read_text() == changed
    randlora_ext.peft.disable()  # the row's own file enables it
    found = {"base": llama(), "peft": peft, "print_verbose": str, "train_config": SimpleNamespace()}
    found["train_config"].query_template = "{query}"
    found["tokenizer"] = SimpleNamespace(pad=pad)
    found["get_train_valid_test_datasets"] = lambda **named: (Rows(), None, None)
    model = runpy.run_path(str(run), found)["main"](str(run.parent / "experiments" / metamath.NAME))
    assert len(are_calibrated(model)) == 14 and all(are_calibrated(model))
    with pytest.raises(ValueError, match="'import random.n' 0 times"):
        metamath.with_hook(RUNNER.replace("import random", ""))
