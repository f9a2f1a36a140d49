"""`ForgettingBudget` keeps the budget at the end of a training, and never ends one."""

import copy
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from layer_helpers import relative
from peft_helpers import adapted, deltas, layers, randomize
from torch.utils.data import DataLoader
from trainers import EVALUATED, ROWS, base, is_calibrated, logged, lora, model, told_by, trainer

import randlora_ext
from randlora_ext import ForgettingBudget, forgetting
from randlora_ext.budget import _random_states_kept

pytestmark = pytest.mark.filterwarnings("ignore")


def trained(folder, max_rise, make=model, **options):
    run = trainer(make(), folder, budget={"max_rise": max_rise}, **EVALUATED | options)
    run.train()
    return run


@pytest.fixture(scope="module")
def free(tmp_path_factory):
    """A training without a budget."""
    randlora_ext.peft.enable()
    return trained(tmp_path_factory.mktemp("free"), None)


def test_the_largest_factor_within_the_budget(free, tmp_path, capsys):
    rise = logged(free, "eval_forgetting")[-1]
    run = trained(tmp_path, rise / 3)
    (factor,) = logged(run, "dial")
    assert factor * 64 == int(factor * 64) and 0 < factor < 1
    for now, was in zip(deltas(run.model), deltas(free.model), strict=True):
        assert relative(now, was.double() * factor) < 1e-6
    assert forgetting(run.model).nats <= rise / 3
    randlora_ext.set_dial(run.model, (factor + 1 / 64) / factor)
    assert forgetting(run.model).nats > rise / 3
    assert f"dW times {factor:g}" in capsys.readouterr().out


def test_it_shows_what_the_budget_costs(free, tmp_path, capsys):
    run = trained(tmp_path, logged(free, "eval_forgetting")[-1] / 3)
    before, after = logged(run, "eval_loss")[-2:]
    assert before == logged(free, "eval_loss")[-1] != after == run.evaluate()["eval_loss"]
    assert f"at an evaluation loss of {after:.4g} (was {before:.4g})" in capsys.readouterr().out
    assert logged(run, "eval_forgetting")[-1] <= run.callback_handler.callbacks[0].max_rise


def test_without_an_evaluation_set_the_budget_is_kept(free, tmp_path):
    budget = logged(free, "eval_forgetting")[-1] / 3
    run = trained(tmp_path, budget, eval_strategy="no")
    over, within = logged(run, "eval_forgetting")
    assert over > budget >= within == pytest.approx(forgetting(run.model).nats, rel=1e-4)
    assert logged(run, "dial") and not logged(run, "eval_loss")


def test_within_the_budget_nothing_is_turned(free, tmp_path, capsys):
    rise = logged(free, "eval_forgetting")[-1]
    run = trained(tmp_path, 2 * rise)
    assert not logged(run, "dial")
    assert all(map(torch.equal, deltas(run.model), deltas(free.model)))
    assert f"{rise:.3g} nats a token were forgotten, within the" in capsys.readouterr().out


def test_the_best_model_is_turned(tmp_path):
    """Not the last one: it is loaded before."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_forgetting"}
    best |= {"greater_is_better": False, "save_steps": 1}
    run = trained(tmp_path, 1e-4, **best)
    (factor,) = logged(run, "dial")
    assert run.state.best_model_checkpoint.endswith("checkpoint-1")
    best_of = peft.PeftModel.from_pretrained(base(), tmp_path / "checkpoint-1")
    for now, was in zip(deltas(run.model), deltas(best_of), strict=True):
        assert relative(now, was.double() * factor) < 1e-6


def test_a_resumed_training_keeps_the_budget(free, tmp_path):
    """As one that was not interrupted."""
    budget = logged(free, "eval_forgetting")[-1] / 3
    whole = trained(tmp_path, budget)
    resumed = trainer(model(), tmp_path, budget={"max_rise": budget}, **EVALUATED)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(resumed, "dial") == logged(whole, "dial") != []
    assert all(map(torch.equal, deltas(resumed.model), deltas(whole.model)))


def test_only_the_adapter_that_trains_is_turned(free, tmp_path):
    adapted = model()
    adapted.add_adapter("two", copy.deepcopy(adapted.peft_config["default"]))
    run = trained(tmp_path, logged(free, "eval_forgetting")[-1] / 3, make=lambda: adapted)
    two = model()
    two.add_adapter("two", copy.deepcopy(two.peft_config["default"]))
    assert logged(run, "dial")
    for now, was in zip(layers(adapted), layers(two), strict=True):
        assert torch.equal(now.randlora_lambda["two"], was.randlora_lambda["two"])


def test_other_adapters_have_no_dial(tmp_path, caplog):
    run = trainer(lora(), tmp_path, budget={"max_rise": 1e-8}, **EVALUATED)
    found = told_by(run, caplog)
    assert found[-1][0] == "WARNING" and "only RandLoRA adapters on our layers have" in found[-1][1]
    assert len(logged(run, "eval_forgetting")) == 4 and run.state.global_step == 3


def test_a_refusal_is_told_in_a_line(tmp_path, caplog):
    run = trainer(model(bias="all"), tmp_path, budget={"max_rise": 1e-8}, **EVALUATED)
    found = told_by(run, caplog)
    assert [level for level, _ in found] == ["WARNING"] * 2  # not shown, and not kept
    assert all("'default' trains biases" in line for _, line in found)
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize(
    "given, why",
    [
        ({"prompts": [[3, 1000]]}, "prompts must hold tokens in"),
        ({"batches": [torch.tensor([[5]])]}, "batches must hold tokens that count"),
    ],
)
def test_what_cannot_be_measured_is_told_before_the_first_step(tmp_path, caplog, given, why):
    run = trainer(model(), tmp_path, budget=given)
    steps = []

    class Told(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            steps.append([record.message for record in caplog.records])

    run.add_callback(Told())
    ((level, line),) = told_by(run, caplog)  # once
    assert level == "WARNING" and why in line and any(why in told for told in steps[0])


def test_a_card_that_training_does_not_use_is_not_asked(monkeypatch):
    """It may be full."""

    def full():
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", full)
    state = torch.get_rng_state()
    with _random_states_kept():
        torch.rand(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_callback_of_another_trainer_does_nothing(tmp_path, caplog):
    other = trainer(model(), tmp_path / "other")
    of_other = other.callback_handler.callbacks[-1]
    of_other.max_rise = 1e-9
    run = trainer(model(), tmp_path, budget=None, **EVALUATED)
    run.add_callback(of_other)
    ((level, line),) = told_by(run, caplog)
    assert level == "WARNING" and "made for another trainer" in line
    assert "eval_forgetting" not in run.evaluate()
    assert not logged(run, "eval_forgetting") and not logged(run, "dial")
    assert not is_calibrated(run.model) and not is_calibrated(other.model)


def test_a_budget_that_no_factor_keeps(free, tmp_path, caplog):
    run = trainer(model(), tmp_path, budget={"max_rise": 1e-9}, **EVALUATED)
    ((level, line),) = told_by(run, caplog)
    assert level == "WARNING"
    assert "and so they are with dW times 0.015625; dW stays as it was" in line
    assert all(map(torch.equal, deltas(run.model), deltas(free.model)))


# What fails beside the training


def test_a_model_that_writes_no_text_is_trained(tmp_path, caplog):
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    settings = transformers.T5Config(**shape, vocab_size=50, decoder_start_token_id=0)
    net = adapted(transformers.T5ForConditionalGeneration(settings), ["q"], basis="hadamard")
    run = trainer(randomize(net, size=0), tmp_path, **EVALUATED)
    ((level, line),) = told_by(run, caplog)  # once
    assert level == "WARNING" and "forgetting is not shown: own text needs a decoder" in line
    assert run.state.global_step == 3 and is_calibrated(net)


@pytest.mark.parametrize("where", ["calibrate", "forgetting", "set_dial"])
def test_no_failure_ends_a_training(where, tmp_path, caplog, monkeypatch):
    def fail(*given, **options):
        raise KeyError("of something")

    monkeypatch.setattr(f"randlora_ext.budget.{where}", fail)
    run = trainer(model(), tmp_path, budget={"max_rise": 1e-4}, **EVALUATED)
    found = told_by(run, caplog)
    assert run.state.global_step == 3 and {level for level, _ in found} == {"WARNING"}
    assert "KeyError: 'of something'" in caplog.text and "Traceback" in caplog.text


def test_an_evaluation_that_fails_at_the_end_does_not_cost_the_budget(free, tmp_path, caplog):
    budget = logged(free, "eval_forgetting")[-1] / 3
    run = trainer(model(), tmp_path, budget={"max_rise": budget}, learning_rate=3e-4)
    run.eval_dataset = [{"input_ids": torch.tensor([60]), "labels": torch.tensor([60])}]
    told_by(run, caplog)
    assert "not evaluated: index out of range" in caplog.text
    assert forgetting(run.model).nats <= budget and logged(run, "dial")


class Saves(transformers.TrainerCallback):
    """At the end, as callbacks that upload a model."""

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.saved = copy.deepcopy(model)


def test_what_other_callbacks_save_at_the_end_is_within_the_budget(free, tmp_path):
    run = trainer(model(), tmp_path, budget=None, **EVALUATED)
    saves = Saves()
    run.add_callback(saves)
    run.add_callback(ForgettingBudget(run, max_rise=logged(free, "eval_forgetting")[-1] / 3))
    run.train()
    assert logged(run, "dial")
    assert all(map(torch.equal, deltas(saves.saved), deltas(run.model)))


class FailsToReport(transformers.TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs.keys() & {"eval_forgetting", "dial"}:
            raise ConnectionError("no network")


def test_a_log_that_fails_does_not_cost_the_budget(free, tmp_path, caplog, capsys):
    budget = logged(free, "eval_forgetting")[-1] / 3
    run = trainer(model(), tmp_path, budget={"max_rise": budget}, **EVALUATED)
    run.add_callback(FailsToReport())
    found = told_by(run, caplog)
    assert {line for _, line in found} == {
        "eval_forgetting not logged: no network",
        "dial not logged: no network",
    }
    assert forgetting(run.model).nats <= budget
    assert "with dW times" in capsys.readouterr().out


def test_a_loader_as_its_text_draws_no_random_number_of_the_training(tmp_path):
    run = trainer(model(), tmp_path, budget=None)
    before = torch.get_rng_state()
    budget = ForgettingBudget(run, batches=DataLoader(ROWS, 2, shuffle=True))
    assert torch.equal(torch.get_rng_state(), before) and len(budget.text) == 8


@pytest.mark.parametrize(
    "given, error, told",
    [
        ({"batches": ROWS[0]}, TypeError, "batches must be several"),
        ({"batches": iter([])}, ValueError, "batches must hold tokens that count"),
        ({"batches": [5]}, TypeError, "batches must hold tensors of token numbers, .* got 5"),
        ({"prompts": "a text"}, TypeError, "prompts must be rows of token ids"),
        ({"max_rise": 0}, ValueError, "max_rise must be a positive finite number or None, got 0"),
        ({"max_rise": "1"}, TypeError, "max_rise must be a positive finite number or None"),
        ({"prompts": [[1]], "batches": []}, ValueError, "give one of them"),
    ],
)
def test_what_is_refused(given, error, told, tmp_path):
    with pytest.raises(error, match=told):
        ForgettingBudget(trainer(model(), tmp_path), **given)


def test_it_takes_its_trainer():
    with pytest.raises(
        TypeError, match="trainer.add_callback.ForgettingBudget.trainer, .* got 0.1"
    ):
        ForgettingBudget(0.1)


def test_the_package_imports_no_transformers():
    program = "import sys, randlora_ext; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_name_that_the_package_does_not_have():
    """Its callback is imported on first use, by `__getattr__`."""
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        randlora_ext.Nothing  # noqa: B018
