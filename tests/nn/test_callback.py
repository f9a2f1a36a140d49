"""`CalibrateCallback`: Trainer calibrates before its first step, and trains as without it."""

import copy
import logging
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from cli_helpers import llama
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


def test_the_vectors_are_those_of_calibrate(tmp_path, caplog, capsys):
    """All rows, or as many as `batches` says."""
    ours, other, few = model(), model(), model()
    assert begin(ours, caplog, tmp_path, rows=ROWS[:8]) == []
    assert capsys.readouterr().out.count("randlora_ext: calibrated the adapter\n") == 1
    calibrate(other, [{"input_ids": torch.stack([row["input_ids"] for row in ROWS[:8]])}])
    for key, scale in scales(other).items():
        torch.testing.assert_close(scales(ours)[key], scale)
    trainer(few, tmp_path, ROWS[:8], [CalibrateCallback(batches=1)]).train()
    assert is_calibrated(few)
    key = "model.layers.0.self_attn.q_proj.randlora_input_scale.default"
    assert not torch.equal(scales(few)[key], scales(ours)[key])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(ROWS)


def drawing(rows):
    """Collates, and draws from every generator, as collators that mask or augment."""
    drawn = torch.rand(()).item(), random.random(), float(np.random.rand())
    ids = torch.stack([row["input_ids"] for row in rows])
    seen = (ids + int(1e6 * sum(drawn))) % 50
    return {"input_ids": seen, "labels": seen}


@pytest.mark.parametrize("rows", [ROWS, Stream()], ids=["map", "stream"])
@pytest.mark.parametrize("workers", [0, 1])
def test_training_sees_the_batches_that_it_sees_without(rows, workers, tmp_path):
    seen, states = [], []
    for callbacks in ([], [CalibrateCallback()]):
        adapted, batches = model(), []
        run = trainer(adapted, tmp_path, rows, callbacks, dataloader_num_workers=workers)
        run.data_collator = drawing

        def note(module, args, given, batches=batches):
            if module.training:
                batches.append(given["input_ids"].clone())

        adapted.register_forward_pre_hook(note, with_kwargs=True)
        run.train()
        seen.append(torch.cat(batches))
        states.append((torch.rand(()).item(), random.random(), np.random.rand()))
        assert is_calibrated(adapted) == bool(callbacks)
    assert len(seen[0]) == 6 and torch.equal(*seen) and states[0] == states[1]


def test_a_model_that_cannot_be_calibrated_is_trained_as_it_is(tmp_path, caplog, capsys):
    """A warning, if the user should do something about it."""

    def merged():
        adapted = model()
        for module in adapted.modules():
            if isinstance(module, randlora_ext.RandLoraLinear):
                module.merge()
        adapted.lm_head.requires_grad_(True)  # something has to be trained
        return adapted

    done = model()
    calibrate(done, [{"input_ids": torch.arange(5)[None]}])
    trained = randomize(copy.deepcopy(done))
    sparse = model(basis="independent", density=0.3)
    for adapted, level, told in (
        (randomize(model()), "WARNING", "has trained"),
        (merged(), "WARNING", "is merged"),
        (sparse, "INFO", "no active adapter is on Hadamard bases"),
        (llama(), "INFO", "the model has no RandLoRA adapter"),
        (done, "INFO", "the adapter is calibrated already"),
        (trained, "INFO", "the adapter is calibrated already"),
    ):
        before = copy.deepcopy(scales(adapted))
        ((found, line),) = begin(adapted, caplog, tmp_path)
        assert found == level and line.startswith("not calibrated: ") and told in line
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
    caplog.clear()
    run = trainer(resumed, tmp_path, ROWS[::-1], [CalibrateCallback()])
    with caplog.at_level(logging.INFO, "randlora_ext"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "training resumes after step 2" in caplog.text
    assert is_calibrated(resumed)
    assert all(torch.equal(scales(begun)[key], scale) for key, scale in scales(resumed).items())


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
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        randlora_ext.Nothing  # noqa: B018
