"""The benchmark programs at toy size: what they write and what they draw."""

import copy
import json
import math
import re
from pathlib import Path

import approximate
import budget
import checkpoint
import finetune
import hadamard_floors
import layer
import merge
import micro
import model_step
import peft_llama
import plots
import pytest
import record
import spelling
import to_lora
import torch
from cli_helpers import llama
from methods import METHODS
from peft_helpers import randomize

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread", "stock_peft")


@pytest.fixture
def run(tmp_path):
    """Runs a benchmark with the options of a line; returns what it wrote."""

    def run(module, line: str, *more: str) -> dict:
        out = tmp_path / module.__name__
        module.main([*line.split(), *more, "--out", str(out)])
        found = json.loads(out.with_suffix(".json").read_text())
        about = {"date", "cpu", "threads", "torch", "peft", "commit", "version", "isa"}
        assert about <= set(found["machine"])
        return found

    return run


@pytest.fixture
def in_this_process(monkeypatch):
    """The server that forks each measurement would import for seconds."""
    for module in (layer, model_step, record):
        monkeypatch.setattr(module, "in_a_process", lambda function, *a, **k: function(*a, **k))


SMALL = "--sizes 48x64 --tokens 4 --repeats 1 --densities"


def test_layer_compares_every_method(run, in_this_process):
    row = run(layer, f"{SMALL} 0.2 --methods all")["rows"][0]
    assert (row["in"], row["out"], row["tokens"], row["density"]) == (48, 64, 4, "0.2")
    assert row["error"] < 1e-5 and row["regret"] >= 0
    assert all(row[method] > 0 for method in METHODS)


def test_layer_measures_memory(monkeypatch, run):
    def in_a_process(function, *arguments, **options):  # no time is measured
        return {} if function is layer.compare else separately(function, *arguments, **options)

    separately = layer.in_a_process
    monkeypatch.setattr(layer, "in_a_process", in_a_process)
    case = "--sizes 2048x2048 --tokens 4 --densities 0.2 --methods ours --memory"
    (row,) = run(layer, case)["rows"]
    assert row["frozen_mib"] > 8 and "ours_mib" in row, "a weight of 16 MiB"


def test_layer_appends_paths(run, capsys, in_this_process):
    for case in ("0.2 --dtype bf16", "hadamard"):
        rows = run(layer, f"{SMALL} {case} --paths --append")["rows"]
    assert [row["density"] for row in rows] == ["0.2", "hadamard"]
    assert "merged" not in rows[0] and "delta" not in rows[1] and rows[1]["regret"] >= 0
    assert "of 2 rows" in capsys.readouterr().out


def test_micro_counts_and_shares(run):
    cases = "--sizes 40x72,72x40 --densities 1/3,0.1,hadamard --tokens 3 --rank 8"
    found = run(micro, f"{cases} --least 0.0001 --gemm 64 --triads 1")
    (triad,) = found["peaks"]["bytes"].values()
    assert {row["op"] for row in found["rows"]} == {
        "fill_planes_", "planes_to_lists, rows", "planes_to_lists, columns", "scaled_basis",
        "scaled_basis backward", "delta_weight", "delta_weight backward", "merged_weight",
        "linear", "linear backward", "hadamard basis from a seed", "hadamard_weight",
        "hadamard_linear", "hadamard_linear backward",
    }  # fmt: skip
    for row in found["rows"]:
        of_bytes = row["bytes"] / triad
        of_operations = row["operations"] / found["peaks"]["operations"]
        assert row["roofline"] == pytest.approx(max(of_bytes, of_operations) / row["us"] * 1e6)


def test_checkpoint_sizes():
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 16,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    lora, stock, ours = checkpoint.sizes(rank=8, shape=shape).values()
    assert lora == 3 * 4 * 8 * (32 + 32 + 32 + 16)
    n, d = (4, 2), (32, 16)  # of q_proj and v_proj
    assert ours == 3 * 4 * sum(8 * n + n * d for n, d in zip(n, d, strict=True))
    bases = 4 * (8 * 32 + 32 * 4 * 8)  # A and B, with every layer and once beside them
    assert stock == ours + (2 * 3 + 1) * bases


def test_approximate(monkeypatch, run):
    targets = approximate.random_targets
    gaussian = lambda *a: {"gaussian": targets(*a)["gaussian"]}  # noqa: E731
    monkeypatch.setattr(approximate, "random_targets", gaussian)
    line = "--size 32 --ranks 4,16 --steps 150 --seeds 1 --bases dense,1/3,hadamard"
    rows = {(r["r"], r["bases"]): r for r in run(approximate, line)["rows"]}
    assert len(rows) == 2 * 3
    few, many = rows[16, "1/3"], rows[4, "1/3"]
    assert many["parameters"] > few["parameters"] and many["randlora"] < few["randlora"] < 1
    # A Gaussian target has no direction that is easier than another.
    assert few["randlora"] == pytest.approx(math.sqrt(1 - few["share"]), abs=0.05)
    for bases in ("dense", "hadamard"):  # leave out no input either
        other = rows[16, bases]
        assert other["randlora"] == pytest.approx(math.sqrt(1 - other["share"]), abs=0.05)


def test_the_numbers_of_the_page_are_those_of_the_budget(capsys):
    budget.main([])
    printed = capsys.readouterr().out
    page = (ROOT / "docs" / "distributed.md").read_text().split("## What it takes")[1]
    numbers = re.findall(r"[\d.]+ [MGT]B", page)
    assert len(numbers) >= 10 and all(number in printed for number in numbers)


def test_merge(run, in_this_process):
    written = run(merge, "--size 64 --layers 2 --rank 8 --cycles 3")["rows"]
    rows = {row["way"]: row for row in written}
    assert tuple(rows) == merge.WAYS
    assert all(row["merge"] > 0 and row["unmerge"] > 0 for row in rows.values())
    assert rows["host"]["drift"] == rows["device"]["drift"] == 0
    assert min(rows[way]["drift"] for way in ("lora", "peft", "nothing")) > 0


def test_model_step(run, in_this_process):
    methods = "--methods", "lora,ours 0.07,ours hadamard,peft very_sparse"
    rows = run(model_step, "--shape toy --batch 1 --tokens 4 --repeats 1", *methods)["rows"]
    lora, ours, hadamard, stock = rows
    assert lora["over_first"] == 1.0
    assert ours["trained"] == hadamard["trained"] == stock["trained"] < lora["trained"]
    assert ours["peak_mib"] > 100


def test_to_lora(monkeypatch, run):
    def square(model, *_):
        with torch.no_grad():
            return model(torch.arange(6)[None]).logits.square().mean().item()

    fakes = {
        "read_words": lambda: ([], []),
        "plan_batches": lambda *_: [],
        "load_model": lambda: (None, llama()),
        "train": lambda tuned, *_: [randomize(tuned)],
        "held_out_loss": square,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(spelling, name, fake)
    rows = run(to_lora, "--ranks 8 48", "--method", "randlora hadamard")["rows"]
    untuned, adapter, low, full, merged = rows
    assert 0 < low["energy"] < full["energy"] == pytest.approx(1)
    assert 0 < adapter["bytes"] < low["bytes"] < full["bytes"]
    for row in (full, merged):
        assert row["held_out_loss"] == pytest.approx(adapter["held_out_loss"], rel=1e-4)
    assert abs(untuned["held_out_loss"] / adapter["held_out_loss"] - 1) > 1e-3


def test_finetune_goes_on_where_it_was(monkeypatch, tmp_path):
    asked = []

    def run(**setting):
        asked.append(setting["seed"])
        losses = [2.0] * 11 + [2.6 if setting["seed"] else 2.0]  # the second jumps
        ranks = {kind: [10.0, 20.0 + setting["seed"]] for kind in finetune.TARGETS}
        done = {"held_out_loss": 1.0 + setting["seed"], "train_loss": losses}
        return setting | done | {"effective_rank": ranks, "forgetting": 2.0}

    def settings(seeds, gamma="signs"):
        each = [("lora", 5e-4, seed, 12, 20.0, "fp32", gamma) for seed in range(seeds)]
        return [dict(zip(finetune.KEY, values, strict=True)) for values in each]

    monkeypatch.setattr(finetune, "run_one", run)
    finetune.sweep(settings(1), tmp_path / "runs.jsonl")
    rows = finetune.sweep(settings(2), tmp_path / "runs.jsonl")
    assert asked == [0, 1]
    row = "| lora | 20 | fp32 | signs | 0.0005 | 1.500 (1.000, 2.000) | 1 of 2 | 2.00 | 15 | 15 |"
    assert row in finetune.table(rows)
    old = {k: v for k, v in rows[0].items() if k not in ("gamma", "effective_rank")}
    (tmp_path / "runs.jsonl").write_text(json.dumps(old) + "\n")  # of before gamma had a choice
    (row,) = finetune.sweep(settings(1, "constant"), tmp_path / "runs.jsonl")
    assert asked == [0, 1] and "| constant | 0.0005 | 1.000 (1.000) |" in finetune.table([row])


@pytest.mark.parametrize("method", ["randlora hadamard", "lora", "full"])
def test_finetune_tells_the_effective_rank(method):
    base = llama(num_hidden_layers=4)
    changed = copy.deepcopy(base)
    tuned = finetune.adapted(changed, method, seed=3, gamma="signs")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "gamma" in name:
                assert len(p.unique()) == 2 and p.abs().unique().numel() == 1
                assert 0.3 < (p > 0).float().mean() < 0.7
            elif p.requires_grad:
                p.add_(0.01 * torch.randn(p.shape, generator=generator))
    found = finetune.effective_ranks(base, tuned)  # of layer 3 alone: there is no 15
    assert found.keys() == set(finetune.TARGETS) and all(len(r) == 1 for r in found.values())
    layers = (model.model.layers[3].mlp.down_proj for model in (base, changed))
    before, after = layers
    delta = after.weight - before.weight if method == "full" else after.get_delta_weight("default")
    share = torch.linalg.svdvals(delta.detach().double()).square()
    share /= share.sum()
    want = float((-torch.xlogy(share, share).sum()).exp())
    assert found["down_proj"][0] == pytest.approx(want, rel=0.01)
    assert want > 10 or method == "lora"


@pytest.mark.skipif(not (ROOT / "benchmarks/results").is_dir(), reason="an sdist has no results")
def test_plots_are_drawn_from_the_results_and_shown(tmp_path):
    plots.main(["epyc-zen4", "--out", str(tmp_path)])
    drawn = {path.name for path in tmp_path.glob("*.png")}
    committed = {path.name: path for path in (ROOT / "docs" / "figures").glob("bench-*.png")}
    assert drawn == set(committed)
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "".join(page.read_text() for page in pages)
    for name, path in committed.items():
        assert f"figures/{name}" in text and path.stat().st_size < 200_000


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_peft_llama(monkeypatch, capsys, kind):
    monkeypatch.setattr("sys.argv", ["peft_llama.py", "--tiny", "--added", "--kind", kind])
    peft_llama.main()  # exits with an error if the losses differ
    assert "times what stock's adds" in capsys.readouterr().out


def test_the_floors_of_hadamard_bases():
    row = {"in": 2048, "out": 2048, "rank": 32, "tokens": 10, "dtype": "float32"}
    products, added, moved = hadamard_floors.work(row)
    K, n = 2048, 64  # four class products, two transforms of 11 stages, three mixes of 5
    assert products == 10 * 4 * K * n and added == 10 * (2 * 2048 * 11 + 3 * K * 5)
    assert moved == 10 * 4 * (7 * 2048 + 6 * K)
