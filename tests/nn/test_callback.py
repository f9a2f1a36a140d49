"""`CalibrateCallback`: Trainer calibrates before its first step, and trains as without it."""

import copy
import logging
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from language_models import llama
from layer_helpers import randomize
from torch.utils.data import IterableDataset

transformers = pytest.importorskip("transformers")

import randlora_ext  # noqa: E402
from randlora_ext import CalibrateCallback, calibrate  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory")

ROWS = [{"input_ids": row, "labels": row} for row in torch.arange(96).view(16, 6) % 50]


def model(**options):
    return randlora_ext.apply_randlora(llama(), ["q_proj", "down_proj"], r=4, **options)


def trainer(model, folder, rows=ROWS, callbacks=(), **options):
    options = {"max_steps": 3, "save_steps": 2, "per_device_train_batch_size": 2} | options
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 1}
    settings = transformers.TrainingArguments(str(folder), **quiet, **options)
    return transformers.Trainer(model, settings, train_dataset=rows, callbacks=list(callbacks))


def scales(model):
    state = model.state_dict()
    return {key: value for key, value in state.items() if "randlora_input_scale" in key}


def is_calibrated(model):
    return any(bool((scale != 1).any()) for scale in scales(model).values())


def begin(model, told, folder, **options):
    """What the callback logs when training begins, with the level."""
    told.clear()
    with told.at_level(logging.INFO, "randlora_ext"):
        trainer(model, folder, callbacks=[CalibrateCallback()], **options).train()
    return [
        (each.levelname, each.message)
        for each in told.records
        if each.name.startswith("randlora_ext")
    ]


KEY = "model.layers.0.self_attn.q_proj.randlora_input_scale.default"


def test_the_vectors_are_those_of_calibrate_on_all_rows(tmp_path, caplog):
    ours, other = model(), model()
    begin(ours, caplog, tmp_path, rows=ROWS[:8])
    calibrate(other, [{"input_ids": torch.stack([row["input_ids"] for row in ROWS[:8]])}])
    for key, scale in scales(other).items():
        torch.testing.assert_close(scales(ours)[key], scale)


def test_calibration_is_told_once(tmp_path, caplog, capsys):
    """On the standard output; there is nothing to log."""
    assert begin(model(), caplog, tmp_path, rows=ROWS[:8]) == []
    assert capsys.readouterr().out.count("randlora_ext: calibrated the adapter\n") == 1


def test_batches_limits_what_calibrates(tmp_path):
    every, few = model(), model()
    trainer(every, tmp_path, ROWS[:8], [CalibrateCallback()]).train()
    trainer(few, tmp_path, ROWS[:8], [CalibrateCallback(batches=1)]).train()
    assert is_calibrated(few) and not torch.equal(scales(few)[KEY], scales(every)[KEY])


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

    def __init__(self, rows, workers, folder, callbacks):
        self.model, self.batches = model(), []
        self.model.register_forward_pre_hook(self._note, with_kwargs=True)
        run = trainer(self.model, folder, rows, callbacks, dataloader_num_workers=workers)
        run.data_collator = drawing
        run.train()
        self.drawn_next = torch.rand(()).item(), random.random(), np.random.rand()

    def _note(self, module, args, given):
        if module.training:
            self.batches.append(given["input_ids"].clone())


@pytest.mark.parametrize("rows", [ROWS, Stream()], ids=["map", "stream"])
@pytest.mark.parametrize("workers", [0, 1])
def test_training_sees_the_batches_that_it_sees_without(rows, workers, tmp_path):
    without = Training(rows, workers, tmp_path, [])
    calibrated = Training(rows, workers, tmp_path, [CalibrateCallback()])
    assert is_calibrated(calibrated.model) and not is_calibrated(without.model)
    assert len(without.batches) == 3
    assert torch.equal(torch.cat(calibrated.batches), torch.cat(without.batches))
    assert calibrated.drawn_next == without.drawn_next


def merged():
    adapted = model()
    for module in adapted.modules():
        if isinstance(module, randlora_ext.RandLoraLinear):
            module.merge()
    adapted.lm_head.requires_grad_(True)  # something has to be trained
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
    "no adapter": (llama, "INFO", "the model has no RandLoRA adapter"),
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
    ((found, line),) = begin(adapted, caplog, tmp_path)
    assert found == level and line.startswith("not calibrated: ") and message in line
    assert "basis=" not in line
    assert all(torch.equal(before[key], scale) for key, scale in scales(adapted).items())
    assert "calibrated the adapter" not in capsys.readouterr().out


def test_batches_of_something_else(tmp_path, caplog):
    """As GRPO's, which are lists of texts: the trainer makes the model's inputs later."""
    adapted = model()
    run = trainer(adapted, tmp_path, callbacks=[CalibrateCallback()])
    run.data_collator = lambda rows: rows
    run.compute_loss = lambda model, rows, **_: model(**drawing(rows)).loss
    run.train()
    (told,) = (each for each in caplog.records if each.name == "randlora_ext.callback")
    assert "batches hold no arguments of the model" in told.message
    assert told.levelname == "WARNING" and not is_calibrated(adapted)


def test_a_resumed_training_keeps_its_vectors(tmp_path, caplog):
    begun, resumed = model(), model()
    begin(begun, caplog, tmp_path)
    run = trainer(resumed, tmp_path, ROWS[::-1], [CalibrateCallback()])
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert is_calibrated(resumed)
    assert all(torch.equal(scales(begun)[key], scale) for key, scale in scales(resumed).items())


def test_a_resumed_training_tells_that_it_does_not_calibrate(tmp_path, caplog):
    begin(model(), caplog, tmp_path)
    run = trainer(model(), tmp_path, callbacks=[CalibrateCallback()])
    with caplog.at_level(logging.INFO, "randlora_ext"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "training resumes after step 2" in caplog.text


def test_arguments_that_the_model_does_not_take_are_left_out(tmp_path, caplog):
    """TRL's batches have more columns, which its trainers use themselves."""
    adapted = model()
    run = trainer(adapted, tmp_path, callbacks=[CalibrateCallback()])
    run.data_collator = lambda rows: {**drawing(rows), "completion_mask": torch.ones(2)}
    run.compute_loss = lambda model, batch, **_: model(input_ids=batch["input_ids"]).logits.sum()
    run.train()
    assert is_calibrated(adapted)


@pytest.mark.parametrize("bad, error", [(0, ValueError), (True, TypeError), (1.5, TypeError)])
def test_batches_that_are_refused(bad, error):
    with pytest.raises(error, match="batches must be"):
        CalibrateCallback(batches=bad)


def test_the_package_imports_no_transformers():
    program = "import sys, randlora_ext; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_name_that_the_package_does_not_have():
    """Its callback is imported on first use, by `__getattr__`."""
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        randlora_ext.Nothing  # noqa: B018
