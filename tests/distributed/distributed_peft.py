"""Checks of PEFT's models in several processes, run by test_distributed.py."""

import peft
import torch
from distributed_data_parallel import SIZES, batch, share, train
from distributed_ranks import Place, RecordedCollectives, adam, same_parameters, trained, worlds
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import randlora_ext.peft as accelerated

KINDS = ({}, {"basis": "hadamard"})
LIMITS = dict(rtol=1e-4, atol=1e-5)  # PEFT keeps lambda and gamma in float32


def make(ours=True, **kind):
    accelerated.enable() if ours else accelerated.disable()
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(*SIZES), nn.Tanh(), nn.Linear(*reversed(SIZES)))
    options = dict(r=5, randlora_alpha=10, target_modules=["0", "2"], save_projection=False)
    chosen = accelerated.RandLoraConfig if ours else peft.RandLoraConfig
    model = peft.get_peft_model(base, chosen(**(kind or {"sparse": True}), **options))
    for parameter in trained(model):
        nn.init.normal_(parameter, std=0.3)
    return model


@worlds(2)
def check_ddp_sends_stock_bases_and_not_ours(place: Place):
    """DDP broadcasts buffers at every forward, and stock PEFT's dense bases are buffers."""
    x = share(place, batch(0, torch.float32))
    for ours in (False, True):
        model = make(ours)
        parallel = DistributedDataParallel(model)
        for _ in range(2):  # DDP arranges its buckets anew after the first step
            parallel(x).sum().backward()
        with RecordedCollectives() as collectives:
            parallel(x).sum().backward()
        # A and B, for the widest input beside the widest output.
        bases = 0 if ours else 4 * (5 * max(SIZES) + max(SIZES) * max(SIZES))
        assert sum(size for name, size in collectives.sent if "broadcast" in name) == bases
        gradients = sum(p.numel() * p.itemsize for p in trained(model))
        assert sum(size for name, size in collectives.sent if "reduce" in name) == gradients


@worlds(2)
def check_ddp_trains_as_stock_in_one_process(place: Place):
    reference, model = make(ours=False), make()
    parallel = DistributedDataParallel(model)
    for each, select in ((reference, lambda x: x), (parallel, lambda x: share(place, x))):
        optimizer = torch.optim.SGD(trained(each), lr=1e-2)
        train(each, optimizer, range(3), lambda x, select=select: select(x).float())
    same_parameters(model, reference, rtol=1e-4, atol=1e-6)


def shard(model):
    for layer in model.modules():
        if hasattr(layer, "base_layer"):
            fully_shard(layer)
    return fully_shard(model)


@worlds(2)
def check_fsdp(place: Place):
    """Training as of one process, and the adapter's file that one process would write."""
    for kind in KINDS:
        reference, model = make(**kind), shard(make(**kind))
        train(reference, adam(reference), range(3), lambda x: x.float())
        train(model, adam(model), range(3), lambda x: share(place, x).float())
        same_parameters(model, reference, **LIMITS)
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        if place.rank == 0:
            mine = peft.get_peft_model_state_dict(model, state_dict=state)
            theirs = peft.get_peft_model_state_dict(reference)
            torch.testing.assert_close(mine, theirs, **LIMITS)


@worlds(2)
def check_fsdp_merges(place: Place):
    """PEFT adds dW to each rank's part of W; stock PEFT fails here, mixing tensors and DTensors."""
    for kind in KINDS:
        model, x = make(**kind), batch(0, torch.float32)
        wanted = model(x).detach()
        layers = [m for m in model.modules() if hasattr(m, "base_layer")]
        before = [layer.base_layer.weight.detach().clone() for layer in layers]
        shard(model).merge_adapter(safe_merge=True)
        for layer, weight in zip(layers, before, strict=True):
            merged = layer.base_layer.weight
            assert merged.to_local().numel() < weight.numel()  # sharded still
            assert (merged.full_tensor() - weight).abs().max() > 0.1
        torch.testing.assert_close(model(x).detach(), wanted, **LIMITS)
        model.unmerge_adapter()
        torch.testing.assert_close(model(x).detach(), wanted, **LIMITS)
        for layer, weight in zip(layers, before, strict=True):
            assert torch.equal(layer.base_layer.weight.full_tensor(), weight)
