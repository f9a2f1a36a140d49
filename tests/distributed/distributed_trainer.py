"""transformers' and TRL's trainers with `ForgettingBudget` in two processes, run by
test_distributed.py."""

import math
import os
import random
from types import SimpleNamespace

import datasets
import pytest
import torch
import torch.distributed as dist
import transformers
import trl
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from distributed_ranks import Place, full_tensor, same_parameters, trained, worlds
from language_models import llama
from peft_helpers import adapted, are_calibrated, randomize, scales
from tokenizers import Tokenizer, models
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset

import randlora_ext
from randlora_ext.budget import CALIBRATION_BATCHES
from randlora_ext.own_text import own_text

IDS = torch.arange(192).view(32, 6) * 7 % 50
ROWS = [{"input_ids": row, "labels": row} for row in IDS]
STEPS, SIZE = 3, 2  # of training; rows of a batch
OPTIONS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": SIZE,
    "save_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0,
    "seed": 1,
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
}
# To compare with one process: Adam divides gradients near zero by their own rounding.
BY_SGD = {"optim": "sgd", "learning_rate": 1e-6, "save_strategy": "no"}
WRAPPED = {"DDP": DistributedDataParallel, "FSDP2": FSDPModule}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(ROWS)


def new_model():
    # The tokenizer below has this end, and TRL would set it.
    base = llama(eos_token_id=0, initializer_range=0.1)
    options = {"r": 4, "randlora_alpha": 80, "basis": "hadamard"}
    return randomize(adapted(base, ["q_proj", "down_proj"], **options), size=0)


def sharding(trainer):
    """On a CPU accelerate ignores FSDP without a word; here it does what it does on cards."""

    class Sharding(trainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.accelerator.state.fsdp_plugin = plugin
            for state in (PartialState(), self.accelerator.state):
                state.distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True

    return Sharding


def trainer_of_transformers(method, options, **rest):
    make = transformers.Trainer if method == "DDP" else sharding(transformers.Trainer)
    return make(args=transformers.TrainingArguments(**options), **rest)


def trainer_of_trl(method, options, train_dataset, **rest):
    make = trl.SFTTrainer if method == "DDP" else sharding(trl.SFTTrainer)
    words = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<pad>"
    )
    return make(
        args=trl.SFTConfig(bf16=False, gradient_checkpointing=False, **options),
        train_dataset=datasets.Dataset.from_list([{"input_ids": ids} for ids in IDS.tolist()]),
        processing_class=tokenizer,
        **rest,
    )


def begin(place):
    """A new training, as a launcher would start it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    ranks = {"RANK": place.rank, "WORLD_SIZE": place.world}
    ranks |= {"LOCAL_RANK": place.rank, "LOCAL_WORLD_SIZE": place.world}
    os.environ |= {name: str(value) for name, value in ranks.items()}


def train(place, method, make, rows, folder, budget, changes=(), **resume):
    """Trains a new model, with the callback unless `budget` is None; returns it, the trainer, and
    what the steps of this rank saw."""
    begin(place)
    options = {"output_dir": str(folder), **OPTIONS, **dict(changes)}
    if method == "FSDP2":
        options["fsdp"] = True
        options["fsdp_config"] = {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}
    model, batches, seen = new_model(), [], []

    def note(module, _, batch):
        if module.training:
            batches.append({name: batch[name].clone() for name in ("input_ids", "labels")})
            seen.append([scale.clone() for scale in scales(module)])

    model.register_forward_pre_hook(note, with_kwargs=True)
    run = make(method, options, model=model, train_dataset=rows)
    if budget is not None:
        run.add_callback(randlora_ext.ForgettingBudget(run, **budget))
    run.train(**resume)
    assert isinstance(run.model_wrapped, WRAPPED[method])
    losses = logged(run, "loss")
    return SimpleNamespace(model=model, run=run, batches=batches, seen=seen, losses=losses)


def logged(run, key):
    return [entry[key] for entry in run.state.log_history if key in entry]


def in_one_process(rows, collate, batches):
    """Calibrates on these rows and trains on these batches; returns the model and its losses."""
    model, losses = new_model(), []
    batch = collate(rows)
    randlora_ext.calibrate(model, [{name: batch[name] for name in ("input_ids", "labels")}])
    optimizer = torch.optim.SGD(trained(model), lr=1e-6)
    for batch in batches:
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


def of_all_ranks(place, tensor):
    every = [torch.empty_like(tensor) for _ in range(place.world)]
    dist.all_gather(every, tensor.contiguous())
    return every


def compare(place, method, make, rows):
    """With one process, with a run without the callback, and with a run that resumes."""
    folder = place.folder / "-".join(["trainer", method, make.__name__, type(rows).__name__])
    plain = train(place, method, make, rows, folder / "plain", None)
    ours = train(place, method, make, rows, folder, {})
    assert not any(are_calibrated(plain.model)) and all(are_calibrated(ours.model))

    assert len(ours.batches) == len(plain.batches) == STEPS
    for mine, without in zip(ours.batches, plain.batches, strict=True):
        assert all(torch.equal(mine[name], without[name]) for name in without)
    for scale, *of_steps in zip(scales(ours.model), *ours.seen, strict=True):
        assert all(torch.equal(scale, each) for each in of_steps)
        assert all(torch.equal(scale, each) for each in of_all_ranks(place, scale))

    count = CALIBRATION_BATCHES * SIZE * place.world
    data = list(rows) if isinstance(rows, Stream) else ours.run.train_dataset
    chosen = range(count) if isinstance(rows, Stream) else random.Random(0).sample(range(32), count)
    whole = [
        {name: torch.cat(of_all_ranks(place, ids)) for name, ids in batch.items()}
        for batch in ours.batches
    ]
    by_sgd = train(place, method, make, rows, folder / "sgd", {}, BY_SGD)
    reference, losses = in_one_process([data[i] for i in chosen], by_sgd.run.data_collator, whole)
    torch.testing.assert_close(scales(ours.model), scales(reference))
    torch.testing.assert_close(by_sgd.losses, losses, rtol=1e-5, atol=0)
    same_parameters(by_sgd.model, reference, 1e-3)

    last = f"{folder}/checkpoint-2"
    resumed = train(place, method, make, rows, folder, {}, resume_from_checkpoint=last)
    assert len(resumed.batches) == 1
    assert all(map(torch.equal, scales(resumed.model), scales(ours.model)))
    for mine, want in zip(trained(resumed.model), trained(ours.model), strict=True):
        assert torch.equal(full_tensor(mine), full_tensor(want))


def of_all(place, value):
    values = [None] * place.world
    dist.all_gather_object(values, value)
    return values


def whole_copy(model):
    """In one process, without wrappers."""
    copy = new_model()
    state = {name: full_tensor(value) for name, value in model.state_dict().items()}
    copy.load_state_dict(state)
    return copy


def keep_budget(place, method):
    """With a training without a budget, and with one process that reads what both ranks wrote."""
    folder = place.folder / f"budget-{method}"
    changes = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no"}

    def make(method, options, **rest):
        return trainer_of_transformers(method, options, eval_dataset=ROWS[:4], **rest)

    free = train(place, method, make, ROWS, folder, {}, changes)
    assert "generate" in vars(free.model) or method == "DDP"  # as Trainer has registered it
    rises = logged(free.run, "eval_forgetting")
    reference = whole_copy(free.model)
    texts = of_all(place, own_text(reference, seed=place.rank))
    assert len(rises) == STEPS + 1 and not torch.equal(*(text[0]["input_ids"] for text in texts))
    read = randlora_ext.forgetting(reference, sum(texts, []))  # on each rank, which changes no mean
    assert math.isclose(rises[-1], read.nats, rel_tol=1e-4)

    kept = train(place, method, make, ROWS, folder, {"max_rise": rises[-1] / 3}, changes)
    (factor,), within = logged(kept.run, "dial"), logged(kept.run, "eval_forgetting")[-1]
    assert within <= rises[-1] / 3 and of_all(place, [factor, within]) == 2 * [[factor, within]]
    randlora_ext.set_dial(free.model, factor)
    with pytest.raises(ValueError, match="infinite or zero"):  # of the whole lambda, on all ranks
        randlora_ext.set_dial(free.model, 1e300)
    for mine, want in zip(trained(kept.model), trained(free.model), strict=True):
        assert torch.equal(full_tensor(mine), full_tensor(want))


@worlds(2)
def check_trainers_that_keep_a_budget(place: Place):
    for method in WRAPPED:
        keep_budget(place, method)


@worlds(2)
def check_rows_that_are_no_multiple_of_the_ranks(place: Place):
    """Each rank calibrates on as many batches: of seven rows, one rank leaves one out."""
    rows = ROWS[:7]
    changes = {"per_device_train_batch_size": 1, "save_strategy": "no"}
    ids = torch.stack([rows[i]["input_ids"] for i in random.Random(0).sample(range(7), 7)[:6]])
    reference = new_model()
    randlora_ext.calibrate(reference, [{"input_ids": ids, "labels": ids}])
    for method in WRAPPED:
        folder = place.folder / f"seven-{method}"
        ours = train(place, method, trainer_of_transformers, rows, folder, {}, changes)
        torch.testing.assert_close(scales(ours.model), scales(reference))


@worlds(2)
def check_a_rank_whose_rows_fail(place: Place):
    """The other does not wait for it, and both train."""

    def fail(*_):
        raise OSError("no such row")

    for method in WRAPPED:
        folder = place.folder / f"fails-{method}"
        with pytest.MonkeyPatch.context() as patch:
            if place.rank == 1:
                patch.setattr(randlora_ext.trainer_batches, "_rows", fail)
            ours = train(place, method, trainer_of_transformers, ROWS, folder, {})
        assert not any(are_calibrated(ours.model)) and len(ours.losses) == STEPS


@worlds(2)
def check_a_rank_that_fails_to_calibrate_or_to_measure(place: Place):
    """The other does not wait for it, and both train."""

    def fail(*_):
        raise MemoryError("no memory left")

    changes = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no"}

    def make(method, options, **rest):
        return trainer_of_transformers(method, options, eval_dataset=ROWS[:4], **rest)

    for where in ("calibration.observe", "forgetting_meter._measure"):
        with pytest.MonkeyPatch.context() as patch:
            if place.rank == 1:
                patch.setattr(f"randlora_ext.{where}", fail)
            folder = place.folder / f"fails-{where}"
            ours = train(place, "DDP", make, ROWS, folder, {"max_rise": 1e-9}, changes)
        fails_to_calibrate = where == "calibration.observe"
        assert len(ours.losses) == STEPS and any(are_calibrated(ours.model)) != fails_to_calibrate
        assert bool(logged(ours.run, "eval_forgetting")) == fails_to_calibrate


@worlds(2)
def check_trainers_that_calibrate(place: Place):
    for method in WRAPPED:
        compare(place, method, trainer_of_transformers, ROWS)
        compare(place, method, trainer_of_transformers, Stream())
        compare(place, method, trainer_of_trl, None)
