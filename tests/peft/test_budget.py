"""`ForgettingBudget`: Trainer calibrates, shows what is forgotten, keeps the budget, and trains as
without it."""

import copy
import logging
import random
import subprocess
import sys

import numpy as np
import peft
import pytest
import torch
import transformers
from language_models import llama
from layer_helpers import relative
from peft_helpers import adapted, deltas, layers, randomize
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers.trainer_utils import default_compute_objective

import randlora_ext
from randlora_ext import ForgettingBudget, calibrate, forgetting

pytestmark = pytest.mark.filterwarnings("ignore")

ROWS = [{"input_ids": row, "labels": row} for row in torch.arange(96).view(16, 6) % 50]


def base(**options):
    return llama(initializer_range=0.1, **options)


def model(**options):
    options = {"basis": "hadamard", "randlora_alpha": 80, "task_type": "CAUSAL_LM"} | options
    return randomize(adapted(base(), ["q_proj", "down_proj"], r=4, **options), size=0)


def lora():
    torch.manual_seed(0)
    return peft.get_peft_model(base(), peft.LoraConfig(r=4, target_modules=["down_proj"]))


def trainer(model, folder, rows=ROWS, cls=transformers.Trainer, budget=(), **options):
    """With the callback unless `budget` is None; with an evaluation set if it evaluates."""
    options = {"max_steps": 3, "save_steps": 2, "per_device_train_batch_size": 2} | options
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 1}
    settings = transformers.TrainingArguments(str(folder), **quiet, **options)
    held_out = ROWS[:4] if settings.eval_strategy != "no" else None
    run = cls(model, settings, train_dataset=rows, eval_dataset=held_out)
    if budget is not None:
        run.add_callback(ForgettingBudget(run, **dict(budget)))
    return run


def scales(model):
    state = model.state_dict()
    return {key: value for key, value in state.items() if "randlora_input_scale" in key}


def is_calibrated(model):
    return any(bool((scale != 1).any()) for scale in scales(model).values())


def told_by(run, caplog, **resume):
    """What is logged while it trains, as (level, message)."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "randlora_ext"):
        run.train(**resume)
    records = [each for each in caplog.records if each.name.startswith("randlora_ext")]
    return [(each.levelname, each.message) for each in records]


def logged(run, key):
    return [entry[key] for entry in run.state.log_history if key in entry]


# Calibration


def test_the_vectors_are_those_of_calibrate_on_all_rows(tmp_path, caplog, capsys):
    ours, other = model(), model()
    assert told_by(trainer(ours, tmp_path, ROWS[:8]), caplog) == []
    ids = torch.stack([row["input_ids"] for row in ROWS[:8]])
    calibrate(other, [{"input_ids": ids, "labels": ids}])
    for key, scale in scales(other).items():
        torch.testing.assert_close(scales(ours)[key], scale)
    assert capsys.readouterr().out.count("randlora_ext: calibrated the adapter\n") == 1


class Stream(IterableDataset):
    def __iter__(self):
        return iter(ROWS)


def drawing(rows):
    """Collates, and draws from every generator, as collators that mask or augment."""
    drawn = torch.rand(()).item(), random.random(), float(np.random.rand())
    ids = torch.stack([row["input_ids"] for row in rows])
    seen = (ids + int(1e6 * sum(drawn))) % 50
    return {"input_ids": seen, "labels": seen}


class Training:
    """A training, the batches that it saw, and the state of every generator after it."""

    def __init__(self, rows, workers, folder, budget):
        self.model, self.batches = model(), []
        self.model.register_forward_pre_hook(self._note, with_kwargs=True)
        about = {"dataloader_num_workers": workers, "eval_strategy": "steps", "eval_steps": 2}
        run = trainer(self.model, folder, rows, budget=budget, **about)
        run.data_collator = drawing
        run.train()
        self.drawn_next = torch.rand(()).item(), random.random(), np.random.rand()

    def _note(self, module, args, given):
        if module.training:
            self.batches.append(given["input_ids"].clone())


@pytest.mark.parametrize("rows", [ROWS, Stream()], ids=["map", "stream"])
@pytest.mark.parametrize("workers", [0, 1])
def test_training_sees_the_batches_that_it_sees_without(rows, workers, tmp_path):
    without = Training(rows, workers, tmp_path, None)
    calibrated = Training(rows, workers, tmp_path, {"max_rise": 1e-5})  # which is not kept
    assert is_calibrated(calibrated.model) and not is_calibrated(without.model)
    assert len(without.batches) == 3
    assert torch.equal(torch.cat(calibrated.batches), torch.cat(without.batches))
    assert calibrated.drawn_next == without.drawn_next


def merged():
    adapted = model()
    adapted.merge_adapter()
    adapted.base_model.model.lm_head.requires_grad_(True)  # something has to be trained
    return adapted


def calibrated():
    adapted = model()
    calibrate(adapted, [{"input_ids": torch.arange(5)[None]}])
    return adapted


# With a warning, if the user should do something about it.
UNCALIBRATED = {
    "trained": (lambda: randomize(model()), "WARNING", "has trained"),
    "merged": (merged, "WARNING", "is merged"),
    "independent bases": (
        lambda: model(basis="independent", density=0.3),
        "INFO",
        "no active adapter is on Hadamard bases",
    ),
    "LoRA": (lora, "INFO", "the model has no RandLoRA adapter"),
    "calibrated": (calibrated, "INFO", "adapter 'default' is calibrated already"),
    "calibrated and trained": (
        lambda: randomize(calibrated()),
        "INFO",
        "adapter 'default' is calibrated already",
    ),
}


@pytest.mark.parametrize("case", UNCALIBRATED)
def test_a_model_that_cannot_be_calibrated_is_trained_as_it_is(tmp_path, caplog, capsys, case):
    make, level, message = UNCALIBRATED[case]
    adapted = make()
    before = copy.deepcopy(scales(adapted))
    (found, line), *_ = told_by(trainer(adapted, tmp_path), caplog)
    assert found == level and line.startswith("not calibrated: ") and message in line
    assert "basis=" not in line
    assert all(torch.equal(before[key], scale) for key, scale in scales(adapted).items())
    assert "calibrated the adapter" not in capsys.readouterr().out


class Loading(transformers.Trainer):
    """A trainer with a loader of the user's."""

    def get_train_dataloader(self):
        return self.train_dataset


class WithoutDataset:
    def __iter__(self):
        return iter(DataLoader(ROWS, batch_size=2))

    def __len__(self):
        return 8


class ByName(Dataset):
    """Rows that have names, in place of numbers."""

    rows = dict(zip("abcdefghijklmnop", ROWS, strict=True))

    def __getitem__(self, name):
        if not isinstance(name, str):
            raise TypeError(f"no name: {name}")
        return self.rows[name]

    def __len__(self):
        return len(self.rows)


class InLists(Dataset):
    """Gives several rows at once, and no single ones."""

    def __getitems__(self, numbers):
        return [ROWS[i] for i in numbers]

    def __len__(self):
        return len(ROWS)


BATCHED = [{name: row[name][None] for name in row} for row in ROWS]
LOADERS = {
    "no data set": (WithoutDataset, "WithoutDataset, has no data set to read"),
    "names": (lambda: DataLoader(ByName(), 2, sampler=[*ByName.rows]), "TypeError('no name: "),
    "lists of rows": (lambda: DataLoader(InLists(), 2), None),
    "batches as rows": (lambda: DataLoader(BATCHED, batch_size=None), None),
    "texts": (lambda: DataLoader(ROWS, 2, collate_fn=list), "no mappings of the model's arguments"),
    "other names": (
        lambda: DataLoader([{"x": 1}] * 4, 2),
        "hold ['x'], none of which LlamaForCausalLM takes",
    ),
}


@pytest.mark.parametrize("case", LOADERS)
def test_a_loader_of_the_users(tmp_path, caplog, case):
    """What cannot be read calibrates nothing, and what is told of it is true."""
    make, told = LOADERS[case]
    adapted = model()
    run = trainer(adapted, tmp_path, make(), cls=Loading)
    if case in ("texts", "other names"):  # GRPO's trainer makes the model's inputs later
        run.compute_loss = lambda model, rows, **_: model(**BATCHED[0]).loss
    found = told_by(run, caplog)
    assert run.state.global_step == 3 and is_calibrated(adapted) == (told is None)
    assert [level for level, _ in found] == ["WARNING"] * (told is not None)
    assert all(line.startswith("not calibrated: ") and told in line for _, line in found)


class TakesAll(torch.nn.Module):
    """Passes on whatever it gets."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, **arguments):
        return self.inner(**arguments)


def test_a_model_of_any_arguments(tmp_path, caplog):
    net = randomize(adapted(TakesAll(base()), ["down_proj"], r=4, basis="hadamard"), size=0)
    run = trainer(net, tmp_path, remove_unused_columns=False, label_names=["labels"])
    told_by(run, caplog)
    assert is_calibrated(net)


def test_arguments_that_the_model_does_not_take_are_left_out(tmp_path):
    """TRL's batches have more columns, which its trainers use themselves."""
    adapted = model()
    run = trainer(adapted, tmp_path)
    run.data_collator = lambda rows: {**drawing(rows), "completion_mask": torch.ones(2)}
    run.compute_loss = lambda model, batch, **_: model(input_ids=batch["input_ids"]).logits.sum()
    run.train()
    assert is_calibrated(adapted)


def test_a_resumed_training_keeps_its_vectors(tmp_path, caplog):
    begun, resumed = model(), model()
    trainer(begun, tmp_path).train()
    run = trainer(resumed, tmp_path, ROWS[::-1])
    found = told_by(run, caplog, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert found == [("INFO", "not calibrated: training resumes after step 2")]
    assert is_calibrated(resumed)
    assert all(torch.equal(scales(begun)[key], scale) for key, scale in scales(resumed).items())


# What is forgotten

EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 3e-4}


class Reports(transformers.TrainerCallback):
    """As wandb's and TensorBoard's callbacks: sees logs before the user's callbacks."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append((state.global_step, dict(logs)))


@pytest.mark.parametrize("make", [model, lora])
def test_every_evaluation_reports_it(make, tmp_path):
    run = trainer(make(), tmp_path, budget=None, **EVALUATED)
    reports = Reports()
    run.add_callback(reports)
    run.add_callback(ForgettingBudget(run))
    run.train()
    found = [(step, log["eval_forgetting"]) for step, log in reports.seen if len(log) == 2]
    assert [step for step, _ in found] == [1, 2, 3, 3]  # and at the end
    assert found[-1][1] == pytest.approx(forgetting(run.model).nats, rel=1e-6)
    assert 0 < found[0][1] < found[1][1] < found[2][1] == found[3][1]
    assert run.evaluate()["eval_forgetting"] == found[-1][1]


def test_it_may_choose_the_best_model(tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_forgetting"}
    run = trainer(model(), tmp_path, **EVALUATED | best, greater_is_better=False, save_steps=1)
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-1")
    assert run.state.best_metric == logged(run, "eval_forgetting")[0]


@pytest.mark.parametrize(
    "text", [{"prompts": [[3, 4], [5]]}, {"batches": [ROWS[0]["labels"][None]]}]
)
def test_on_a_text_of_the_users(text, tmp_path):
    run = trainer(model(), tmp_path, budget=text, **EVALUATED)
    run.train()
    assert logged(run, "eval_forgetting")[-1] == forgetting(run.model, **text).nats
    assert logged(run, "eval_forgetting")[-1] != forgetting(run.model).nats


def test_a_resumed_training_reads_the_same_text(tmp_path):
    whole = trainer(model(), tmp_path, **EVALUATED)
    whole.train()
    resumed = trainer(model(), tmp_path, **EVALUATED)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(resumed, "eval_forgetting") == logged(whole, "eval_forgetting")


def test_a_search_for_hyperparameters_looks_at_the_loss(tmp_path):
    """Its default objective sums all metrics but the loss, if there are any."""
    run = trainer(model(), tmp_path, **EVALUATED)
    run.compute_objective = default_compute_objective  # as `hyperparameter_search` sets it
    run.train()
    metrics = run.evaluate()
    assert default_compute_objective(dict(metrics)) == metrics["eval_loss"]
    assert len(logged(run, "eval_forgetting")) == 5


def test_callbacks_of_the_trainer_see_it(tmp_path):
    """Those that were added before, too."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_forgetting"}
    best |= {"greater_is_better": False, "save_steps": 1, "max_steps": 5}
    run = trainer(model(), tmp_path, budget=None, **EVALUATED | best)
    run.add_callback(transformers.EarlyStoppingCallback(early_stopping_patience=2))
    run.add_callback(ForgettingBudget(run))
    run.train()
    assert run.state.global_step == 3  # as it rises with every step


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


# The budget


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


def test_a_budget_that_no_factor_keeps(free, tmp_path, caplog):
    run = trainer(model(), tmp_path, budget={"max_rise": 1e-9}, **EVALUATED)
    ((level, line),) = told_by(run, caplog)
    assert level == "WARNING" and "and so they are with dW times 0.015625" in line
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
