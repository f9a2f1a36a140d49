"""Checks of PEFT's models in several processes, run by test_distributed.py."""

import copy

import expert_models
import peft
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_ranks import (
    Place,
    RecordedCollectives,
    bytes_of,
    full_tensor,
    same_parameters,
    sgd,
    trained,
    worlds,
)
from distributed_training import base, batch, share, train
from language_models import llama
from peft_helpers import adapted, are_calibrated, layers, randomize, relative, scales
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

import randlora_ext
import randlora_ext.peft as accelerated


def make(ours=True, **kind):
    accelerated.enable() if ours else accelerated.disable()
    options = dict(r=5, randlora_alpha=10, target_modules=["0", "2"], save_projection=False)
    chosen = accelerated.RandLoraConfig if ours else peft.RandLoraConfig
    model = peft.get_peft_model(base(), chosen(**(kind or {"sparse": True}), **options))
    for parameter in trained(model):
        nn.init.normal_(parameter, std=0.3)
    return model


@worlds(2)
def check_ddp(place: Place):
    """As stock PEFT in one process, without its bases in every forward: they are buffers."""
    reference, model = make(ours=False), make()
    train(reference, sgd(reference), range(3), lambda x: x.float())
    parallel, optimizer = DistributedDataParallel(model), sgd(model)
    for step in range(3):  # DDP arranges its buckets anew after the first
        with RecordedCollectives() as collectives:
            train(parallel, optimizer, [step], lambda x: share(place, x).float())
    assert not collectives.sizes("broadcast")
    assert sum(collectives.sizes("reduce")) == bytes_of(trained(model))
    same_parameters(model, reference, 1e-5)


@worlds(2)
def check_fsdp(place: Place):
    """Training, merging and the adapter's file as of one process, and one more adapter."""
    for kind in ({}, {"sparse": False}, {"basis": "hadamard"}):  # {"sparse": False} is dense
        reference, model = make(**kind), make(**kind)
        parts = layers(model)
        for layer in parts:
            fully_shard(layer)
        fully_shard(model)
        train(reference, sgd(reference), range(3), lambda x: x.float())
        train(model, sgd(model), range(3), lambda x: share(place, x).float())
        same_parameters(model, reference, 1e-5)
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        if place.rank == 0:
            mine = peft.get_peft_model_state_dict(model, state_dict=state)
            theirs = peft.get_peft_model_state_dict(reference)
            assert mine.keys() == theirs.keys()
            for key, wanted in theirs.items():
                assert relative(mine[key], wanted) < 1e-5, key

        weight, x = layers(model)[0].base_layer.weight, batch(0, torch.float32)
        before, wanted = full_tensor(weight).clone(), model(x)
        model.merge_adapter()
        assert relative(model(x), wanted) < 1e-5
        model.unmerge_adapter()
        assert torch.equal(full_tensor(layers(model)[0].base_layer.weight), before)

        model.add_adapter("two", model.peft_config["default"])  # changes nothing yet
        model.set_adapter("two")
        torch.testing.assert_close(model(x), model.get_base_model()(x))


def untrained():
    return randomize(make(basis="hadamard"), size=0)


@worlds(2)
def check_calibration(place: Place):
    """Before DDP and after `fully_shard`: every rank as one process that sees all batches."""
    reference, ddp, model = (untrained() for _ in range(3))
    batches = [batch(step, torch.float32) * 10**step for step in range(4)]
    randlora_ext.calibrate(reference, batches)
    randlora_ext.calibrate(ddp, (batches[:1], batches[1:])[place.rank])
    fully_shard(model.base_model.model[0])
    fully_shard(model)
    randlora_ext.calibrate(model, batches[place.rank :: 2])
    for each in (ddp, model):
        for scale, want in zip(scales(each), scales(reference), strict=True):
            torch.testing.assert_close(scale, want)
            every = [torch.empty_like(scale) for _ in range(place.world)]
            dist.all_gather(every, scale)
            assert torch.equal(*every)


def language_model():
    options = {"randlora_alpha": 100, "basis": "hadamard"}
    base = llama(initializer_range=0.1)
    return randomize(adapted(base, ["q_proj", "down_proj"], **options), size=0)


def texts():
    """Four batches that a language model learns from."""
    for seed in range(4):
        tokens = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(seed))
        yield {"input_ids": tokens, "labels": tokens}


@worlds(2)
def check_strengths_of_calibration(place: Place):
    """Of DDP and FSDP2: every rank as one process that sees all batches. Neither leaves gradients,
    and both train on."""
    reference, ddp, model = (language_model() for _ in range(3))
    want = randlora_ext.calibrate(reference, texts())
    assert len({*want.values()}) > 1
    ddp = DistributedDataParallel(ddp)
    for block in model.base_model.model.model.layers:
        fully_shard(block)
    fully_shard(model)
    own = [*texts()][place.rank :: 2]
    for each in (ddp, model):
        found = randlora_ext.calibrate(each, own)
        torch.testing.assert_close([*found.values()], [*want.values()], rtol=1e-4, atol=0)
        torch.testing.assert_close(scales(each), scales(reference), rtol=1e-3, atol=0)
        assert all(parameter.grad is None for parameter in each.parameters())
        each(**own[0]).loss.backward()
        assert all(full_tensor(p.grad).isfinite().all() for p in trained(each))


@worlds(2)
def check_states_of_calibrated_models(place: Place):
    """By torch's functions for them, which look every key up as an attribute."""
    reference, x = make(basis="hadamard"), batch(9, torch.float32)
    for layer in layers(reference):
        layer.set_input_scale("default", torch.arange(layer.in_features) + 1.0)
    full, path = StateDictOptions(full_state_dict=True), place.folder / "calibrated"
    from_first = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    for shard in (False, True):
        model = untrained()
        before = copy.deepcopy(get_model_state_dict(model, options=full))  # not the tensors
        if shard:
            fully_shard(model.base_model.model[0])
            fully_shard(model)
        set_model_state_dict(model, get_model_state_dict(reference, options=full), options=full)
        torch.testing.assert_close(model(x), reference(x))
        mine = peft.get_peft_model_state_dict(
            model, state_dict=get_model_state_dict(model, options=full)
        )
        theirs = peft.get_peft_model_state_dict(reference)
        assert place.rank or all(torch.equal(mine[key], theirs[key]) for key in theirs)
        dcp.save(get_model_state_dict(model), checkpoint_id=path)
        set_model_state_dict(model, before, options=full)
        assert not any(are_calibrated(model))
        loaded = get_model_state_dict(model)
        dcp.load(loaded, checkpoint_id=path)
        set_model_state_dict(model, loaded)
        torch.testing.assert_close(model(x), reference(x))
        set_model_state_dict(model, before, options=full)
        # The first rank has the state, and the others get it.
        state = get_model_state_dict(reference, options=full) if place.rank == 0 else {}
        set_model_state_dict(model, state, options=from_first)
        torch.testing.assert_close(model(x), reference(x))
        for scale, want in zip(scales(model), scales(reference), strict=True):
            assert torch.equal(scale, want)
        dist.barrier()


@worlds(2)
def check_a_state_of_another_adapter_is_refused(place: Place):
    """By its records, also where torch has written its numbers already: nobody says otherwise."""
    path = place.folder / "another"
    full = StateDictOptions(full_state_dict=True)
    from_first = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    refused = "(?s)does not fit:.*seed=1', not .*seed=0'"
    for shard in (False, True):
        other, model = make(basis="hadamard", projection_prng_key=1), make(basis="hadamard")
        state = get_model_state_dict(other, options=full)
        for each in (other, model) if shard else ():
            fully_shard(each.base_model.model[0])
            fully_shard(each)
        dcp.save(get_model_state_dict(other), checkpoint_id=path)
        loaded = get_model_state_dict(model)
        dcp.load(loaded, checkpoint_id=path)  # into the model's own tensors
        for given, options in ((loaded, None), (state, full), (state, from_first)):
            with pytest.raises(RuntimeError, match=refused) as caught:
                set_model_state_dict(model, dict(given), options=options)
            assert "changed" not in str(caught.value)
        dist.barrier()


@worlds(2)
def check_a_calibrated_model_from_the_meta_device(place: Place):
    """Only the first rank has the numbers, as in torch's recipe for large models."""
    reference, model, x = make(basis="hadamard"), untrained().to("meta"), batch(9, torch.float32)
    for layer in layers(reference):
        layer.set_input_scale("default", torch.arange(layer.in_features) + 1.0)
    fully_shard(model.base_model.model[0])
    fully_shard(model)
    model.to_empty(device="cpu")
    full = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state = get_model_state_dict(reference) if place.rank == 0 else {}
    set_model_state_dict(model, state, options=full)
    torch.testing.assert_close(model(x), reference(x))


@worlds(2)
def check_ddp_of_a_calibrated_model(place: Place):
    """At the start DDP sends the first rank's vectors to all; later it need not."""
    model, reference = untrained(), untrained()
    for number, each in enumerate((model, reference)):
        for layer in layers(each):
            scale = torch.arange(layer.in_features) + 1.0
            layer.set_input_scale("default", scale + place.rank * (1 - number))
    for sends in (True, False):
        ddp = DistributedDataParallel(model, broadcast_buffers=sends)
        assert all(map(torch.equal, scales(model), scales(reference)))
        with RecordedCollectives() as collectives:
            ddp(batch(1, torch.float32)).sum().backward()
        sent = sum(collectives.sizes("broadcast"))
        assert sent == (bytes_of(scales(model)) if sends else 0)


@worlds(2)
def check_tensor_parallelism_is_refused(place: Place):
    """A model that transformers has cut, before anything has changed."""
    configuration = pytest.importorskip("transformers.distributed").DistributedConfig
    folder, chosen = place.folder / "llama", dict(r=4, target_modules=["up_proj"])
    if place.rank == 0:
        llama(num_hidden_layers=1).save_pretrained(folder)
    dist.barrier()
    refused = "layers.0.mlp.up_proj' is cut over ranks .'colwise' in tp_plan.: tensor parallelism"
    cut = configuration(tp_size=2)
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=cut)
    modules = [name for name, _ in model.named_modules()]
    accelerated.enable()
    with pytest.raises(ValueError, match=refused):
        peft.get_peft_model(model, accelerated.RandLoraConfig(basis="hadamard", **chosen))
    assert [name for name, _ in model.named_modules()] == modules


@worlds(2)
def check_experts(place: Place):
    """Training, the adapter's file and merging of ``target_parameters`` as of one process."""
    chosen = {"basis": "hadamard", "targets": [], "target_parameters": expert_models.EXPERTS}
    reference, model, ddp = (
        randomize(adapted(expert_models.make("Mixtral"), r=4, **chosen), size=0) for _ in range(3)
    )
    data = expert_models.batch()
    own, both = slice(place.rank, place.rank + 1), slice(None)
    of = lambda rows: {name: value[rows] for name, value in data.items()}  # noqa: E731
    randlora_ext.calibrate(reference, [of(both)] * 4)
    randlora_ext.calibrate(ddp, [of(own)] * 4)
    ddp = DistributedDataParallel(ddp)
    for block in model.base_model.model.model.layers:
        fully_shard(block)
    fully_shard(model)
    randlora_ext.calibrate(model, [of(own)] * 4)
    for each in (ddp, model):
        for scale, want in zip(scales(each), scales(reference), strict=True):
            assert scale.shape[0] == 4
            torch.testing.assert_close(scale, want)
    for each, rows in ((reference, both), (model, own), (ddp, own)):
        optimizer = sgd(each)
        for _ in range(3):
            each(**of(rows)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for each in (model, ddp.module):
        same_parameters(each, reference, 1e-5)
    full = StateDictOptions(full_state_dict=True)
    wanted, before = model(**data).logits, get_model_state_dict(model, options=full)
    before = {name: value.clone() for name, value in before.items()}
    model.merge_adapter()
    assert relative(model(**data).logits, wanted) < 1e-5
    model.unmerge_adapter()
    after = get_model_state_dict(model, options=full)
    assert place.rank or all(torch.equal(after[name], before[name]) for name in before)
    cut = adapted(expert_models.make("Mixtral"), r=4, **chosen)
    fully_shard(cut.base_model.model.model.layers[0].mlp.experts.base_layer)
    with pytest.raises(RuntimeError, match="let fully_shard take a module around this one"):
        cut(**data)
