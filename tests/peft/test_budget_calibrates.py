"""`ForgettingBudget` calibrates before the first step, and training goes on as without it."""

import copy
import random

import numpy as np
import pytest
import torch
import transformers
from peft_helpers import adapted, randomize
from torch.utils.data import DataLoader, Dataset, IterableDataset
from trainers import ROWS, base, is_calibrated, lora, model, scales, told_by, trainer

from randlora_ext import calibrate
from randlora_ext.trainer_batches import sample

pytestmark = pytest.mark.filterwarnings("ignore")


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


def calibrated_beside_another():
    adapted = calibrated()
    adapted.add_adapter("two", adapted.peft_config["default"])
    adapted.base_model.set_adapter(["default", "two"])
    return adapted


# With a warning, if the user should do something about it.
UNCALIBRATED = {
    "trained": (lambda: randomize(model()), "WARNING", "has trained"),
    "merged": (merged, "WARNING", "is merged"),
    "independent bases": (
        lambda: model(basis="independent", density=0.3),
        "INFO",
        "no active adapter that trains is on Hadamard bases",
    ),
    "LoRA": (lora, "INFO", "the model has no RandLoRA adapter"),
    "calibrated": (calibrated, "INFO", "adapter 'default' is calibrated already"),
    "calibrated and trained": (
        lambda: randomize(calibrated()),
        "INFO",
        "adapter 'default' is calibrated already",
    ),
    "calibrated beside another": (
        calibrated_beside_another,
        "WARNING",
        "'default' is calibrated already, and 'two' is not; before training, activate it alone",
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


class TakesSome(TakesAll):
    """Names a part of what it passes on."""

    def forward(self, input_ids, labels=None, **arguments):
        return self.inner(input_ids=input_ids, labels=labels, **arguments)


def padded(rows):
    """Collates, and pads every other row in place."""
    for row in rows[::2]:
        row["input_ids"][3:] = 0
        row["labels"] = row["input_ids"].clone()
    ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids, "attention_mask": (ids != 0).long()}


@pytest.mark.parametrize("of", [TakesSome, TakesAll, None])
def test_padding_is_left_out_whatever_names_the_mask(of, tmp_path):
    net = base() if of is None else of(base())
    net = randomize(adapted(net, ["down_proj"], r=4, basis="hadamard"), size=0)
    run = trainer(net, tmp_path, copy.deepcopy(ROWS[:8]), remove_unused_columns=False)
    run.data_collator = padded
    run.train()
    other = randomize(adapted(base(), ["down_proj"], r=4, basis="hadamard"), size=0)
    chosen = random.Random(0).sample(range(8), 8)
    batches = [padded([copy.deepcopy(ROWS[i]) for i in chosen[k : k + 2]]) for k in range(0, 8, 2)]
    calibrate(other, batches)
    for one, two in zip(scales(net).values(), scales(other).values(), strict=True):
        torch.testing.assert_close(one / one.norm(), two / two.norm())


def test_a_collator_that_changes_its_rows_gets_copies(tmp_path):
    rows = copy.deepcopy(ROWS)
    run = trainer(model(), tmp_path, rows)
    run.data_collator = padded
    batches = sample(run.model, run.get_train_dataloader(), 2, 4)
    assert any((batch["attention_mask"] == 0).any() for batch in batches)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(rows, ROWS, strict=True))


def test_a_new_adapter_beside_a_frozen_one_is_calibrated(tmp_path, caplog):
    net = randomize(calibrated())
    net.add_adapter("two", copy.deepcopy(net.peft_config["default"]))
    net.base_model.set_adapter(["default", "two"])
    for name, parameter in net.named_parameters():
        if name.endswith(".default"):
            parameter.requires_grad_(False)
    before = {key: scale for key, scale in scales(net).items() if key.endswith("default")}
    assert told_by(trainer(net, tmp_path), caplog) == []
    after = scales(net)
    assert all(torch.equal(after[key], scale) for key, scale in before.items())
    assert all(bool((after[key] != 1).any()) for key in after if key.endswith("two"))


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
