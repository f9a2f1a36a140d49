"""DeepSpeed ZeRO-3 itself, where it is installed, run by test_distributed.py."""

import os

import deepspeed
import peft
import pytest
import torch
import transformers
from distributed_peft import language_model, texts
from distributed_ranks import Place, sgd, trained, worlds
from distributed_trainer import OPTIONS, ROWS, logged, new_model, of_all
from distributed_trainer import begin as begin_trainer
from distributed_training import base, batch, share, train
from peft_helpers import relative, scales
from torch import nn

import randlora_ext.peft as accelerated
from randlora_ext import ForgettingBudget, RandLoraLinear, calibrate, forgetting, set_dial

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    # Every parameter is partitioned, the smallest too.
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,  # by default 1.0, which one process would have to use, too
}


def plain(model):
    for i in (0, 2):
        model[i] = RandLoraLinear(model[i], r=5, randlora_alpha=10, basis="independent")
    return model


def in_peft(model):
    accelerated.enable()
    options = {"r": 5, "randlora_alpha": 10, "target_modules": ["0", "2"], "basis": "hadamard"}
    return peft.get_peft_model(model, accelerated.RandLoraConfig(**options))


def begin(place: Place):
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(place.rank)}
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


@worlds(2)
def check_calibration(place: Place):
    """As of whole models; no adapter that has trained, though no rank holds its whole lambda."""
    begin(place)
    reference, model = in_peft(base()), in_peft(base())
    deepspeed.initialize(model=model, config=CONFIG, optimizer=sgd(model))
    own = [share(place, batch(0)).float()]
    calibrate(reference, own)
    calibrate(model, own)
    assert all(map(torch.equal, scales(model), scales(reference)))
    before = [scale.clone() for scale in scales(model)]
    lambdas = [p for name, p in model.named_parameters() if "randlora_lambda" in name]
    with deepspeed.zero.GatheredParameters(lambdas, modifier_rank=0):
        for parameter in lambdas if place.rank == 0 else []:
            nn.init.ones_(parameter)
    with pytest.raises(ValueError, match="has trained"):
        calibrate(model, own)
    assert all(map(torch.equal, scales(model), before))


@worlds(2)
def check_strengths_of_calibration(place: Place):
    """Every rank as one process that sees all batches; then both train on, and forget as much."""
    begin(place)
    reference, model = language_model(), language_model()
    engine, *_ = deepspeed.initialize(model=model, config=CONFIG, optimizer=sgd(model))
    own = [*texts()][place.rank :: 2]
    want = calibrate(reference, texts())
    found = calibrate(model, own)
    torch.testing.assert_close([*found.values()], [*want.values()], rtol=1e-4, atol=0)
    assert len({*want.values()}) > 1
    assert all(p.numel() == 0 and p.grad is None for p in model.parameters())
    first, second, *_ = texts()
    of_both = {name: torch.cat([first[name], second[name]]) for name in first}
    optimizer = sgd(reference)
    for _ in range(3):
        engine.backward(engine(**own[0]).loss)
        engine.step()
        reference(**of_both).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    want = forgetting(reference, texts()).nats
    assert 0 < want == pytest.approx(forgetting(model, own).nats, rel=1e-3)
    for each in (reference, model):
        with pytest.raises(ValueError, match="infinite or zero"):
            set_dial(each, 1e300)
        set_dial(each, 0.5)
    same_when_gathered(model, reference)


@worlds(2)
def check_a_trainer_that_keeps_a_budget(place: Place):
    """The dial is the same on all ranks, and turns whole lambdas."""
    begin(place)
    free, of_free = trained_by_trainer(place)
    kept, of_kept = trained_by_trainer(place, max_rise=0.1)
    rise = logged(of_free, "eval_forgetting")[-1]
    (factor,), within = logged(of_kept, "dial"), logged(of_kept, "eval_forgetting")[-1]
    assert within <= 0.1 < rise and of_all(place, factor) == [factor, factor]
    set_dial(free, factor)
    same_when_gathered(kept, free)


def trained_by_trainer(place, **budget):
    """The model and its trainer."""
    sizes = {"per_device_train_batch_size": CONFIG["train_micro_batch_size_per_gpu"]}
    options = OPTIONS | sizes | {"learning_rate": 1e-2, "save_strategy": "no"}
    model = new_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        begin_trainer(place)
        args = transformers.TrainingArguments(
            str(place.folder / "zero3"), deepspeed=CONFIG, **options
        )
        run = transformers.Trainer(model, args, train_dataset=ROWS, eval_dataset=ROWS[:4])
        run.add_callback(ForgettingBudget(run, **budget))
        run.train()
    assert isinstance(run.model_wrapped, deepspeed.DeepSpeedEngine)
    return model, run


@worlds(2)
def check_zero3(place: Place):
    """Trains like one process, and merges what it gathers."""
    begin(place)
    for built_partitioned in (False, True):
        for adapt in (plain, in_peft):
            compare(place, adapt, built_partitioned)


def same_when_gathered(model, reference):
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([ours, theirs]):
            assert relative(ours.data, theirs.data) < 1e-4


def compare(place, adapt, built_partitioned):
    reference = adapt(base())
    for parameter in trained(reference):
        nn.init.normal_(parameter, std=0.3)
    # As transformers does for a large model: its weights are never whole, on any rank.
    with deepspeed.zero.Init(config_dict_or_path=CONFIG, enabled=built_partitioned):
        model = base()
    model = adapt(model)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([ours], 0, enabled=hasattr(ours, "ds_id")):
            ours.data.copy_(theirs.data)
    engine, *_ = deepspeed.initialize(model=model, config=CONFIG, optimizer=sgd(model))
    assert all(p.numel() == 0 for p in model.parameters()), "nothing is partitioned"
    train(reference, sgd(reference), range(3), lambda x: x.float())
    for step in range(3):
        engine.backward(engine(share(place, batch(step)).float()).square().mean())
        engine.step()
    same_when_gathered(model, reference)
    layer = next(m for m in model.modules() if hasattr(m, "randlora_lambda"))
    if adapt is plain:
        with pytest.raises(RuntimeError, match="GatheredParameters"):
            layer.merge()
    x = batch(0).float()
    want = reference(x)
    for act, merged in (layer.merge, True), (layer.unmerge, False):
        with deepspeed.zero.GatheredParameters(list(layer.parameters()), modifier_rank=0):
            act()
        assert layer.merged == merged
        assert relative(engine(x), want) < 1e-5
