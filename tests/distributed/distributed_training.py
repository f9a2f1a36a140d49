"""Checks of DDP and FSDP2, and of what they refuse, run by test_distributed.py."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from distributed_ranks import (
    Place,
    RecordedCollectives,
    adam,
    bytes_of,
    full_tensor,
    same_parameters,
    trained,
    worlds,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from randlora_ext import RandLoraLinear, delta_weight

ROWS, SIZES = 8, (24, 40)


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(*SIZES), nn.Tanh(), nn.Linear(*reversed(SIZES)))


def make(dtype=torch.float64, seed=0):
    """A layer on independent and one on Hadamard bases."""
    model = base().to(dtype)
    options = {"r": 5, "randlora_alpha": 10, "seed": seed}
    model[0] = RandLoraLinear(model[0], basis="independent", density=1 / 3, **options)
    model[2] = RandLoraLinear(model[2], basis="hadamard", **options)
    for parameter in trained(model):
        nn.init.normal_(parameter)
    return model


def sharded(dtype=torch.float64, **options):
    model = make(dtype)
    for layer in (model[0], model[2]):
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def batch(step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(ROWS, SIZES[0], generator=generator, dtype=torch.float64).to(dtype)


def share(place, x):
    return x.chunk(place.world)[place.rank]


def train(model, optimizer, steps, select=lambda x: x):
    """The mean over the batch, so that averaging over ranks gives the same as one process."""
    for step in steps:
        optimizer.zero_grad()
        model(select(batch(step))).square().mean().backward()
        optimizer.step()


def states(model, optimizer):
    names = ("model_state_dict", "optim_state_dict")
    return dict(zip(names, get_state_dict(model, optimizer), strict=True))


@worlds(2)
def check_communication(place: Place):
    """DDP sends parameters, gradients and input scales, FSDP layers and gradients, nobody bases."""
    reference, model = make(), make()
    reference(batch(0)).square().mean().backward()
    with RecordedCollectives() as starts:
        parallel = DistributedDataParallel(model)
    with RecordedCollectives() as step:
        parallel(share(place, batch(0))).square().mean().backward()
    for ours, theirs in zip(trained(model), trained(reference), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-11)
    everything, gradients = bytes_of(model.parameters()), bytes_of(trained(model))
    scales = bytes_of(model.buffers())
    assert everything in starts.sizes("broadcast")
    # Beside these: their shapes, compared. All bases would be 10 times as much.
    bases = sum(bytes_of(layer.bases["default"].packed()) for layer in model[::2])
    assert sum(starts.sizes()) - everything - scales < 200 < bases
    assert step.sizes("broadcast") == [scales] * bool(scales)
    assert step.sizes("allreduce") == [gradients] and len(step.sent) == 1 + bool(scales)

    model = sharded()
    with RecordedCollectives() as step:
        model(share(place, batch(0))).square().mean().backward()
    gathered, reduced = step.sizes("allgather"), step.sizes("reduce_scatter")
    assert len(step.sent) == len(gathered) + len(reduced)
    # Parts are padded to equal numbers of rows: n = 5 in two parts is 3 and 3, for r as well.
    assert sum(reduced) < 1.3 * gradients
    assert len(gathered) <= 6 and sum(set(gathered)) < 1.1 * everything


@worlds(2)
def check_fsdp_16_bit(place: Place):
    """A bfloat16 base beside float32 lambda and gamma, and all of it cast by FSDP's policy."""
    for dtype, policy in (
        (torch.bfloat16, MixedPrecisionPolicy()),
        (torch.float32, MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)),
    ):
        reference, model = make(dtype), sharded(dtype, mp_policy=policy)
        if policy.param_dtype is not None:
            reference.bfloat16()
        x = batch(0, torch.bfloat16)
        reference(x).float().square().mean().backward()
        model(share(place, x)).float().square().mean().backward()
        for ours, theirs in zip(trained(model), trained(reference), strict=True):
            assert ours.dtype == ours.grad.dtype == torch.float32
            gradient = full_tensor(ours.grad)
            assert (gradient - theirs.grad.float()).norm() < 0.02 * theirs.grad.float().norm()


@worlds(2)
def check_state_dict(place: Place):
    """That of a sharded model is that of one process, bit for bit; another's is refused."""
    reference, model = make(), sharded()
    full = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(model, options=full)
    if place.rank == 0:
        own = reference.state_dict()
        assert state.keys() == own.keys()
        assert all(torch.equal(state[name], own[name]) for name in own)
    other = make(seed=1).state_dict()
    before = copy.deepcopy(get_model_state_dict(model))
    with pytest.raises(RuntimeError, match="(?s)state dict of 0 does not fit.*seed=1', not .*=0'"):
        set_model_state_dict(model, other, options=full)
    after = get_model_state_dict(model)
    for name, tensor in before.items():
        assert torch.equal(full_tensor(after[name]), full_tensor(tensor))


@worlds(2)
def check_fsdp_outside_forward(place: Place):
    """dW, merging and unmerging of sharded layers; unequal parts of rows (n = 5, r = 5)."""
    reference, model = make(), sharded()
    layer, plain = model[0], reference[0]
    want = delta_weight(plain.bases["default"], *trained(plain), 2.0)
    delta = layer.get_delta_weight("default")
    assert delta.placements == layer.base_layer.weight.placements
    torch.testing.assert_close(full_tensor(delta), want, rtol=1e-12, atol=1e-12)
    with pytest.raises(TypeError, match="must be a plain tensor, got a DTensor"):
        delta_weight(layer.bases["default"], *trained(layer))

    before = full_tensor(layer.base_layer.weight).clone()
    layer.merge(safe_merge=True)
    plain.merge()
    assert isinstance(layer.base_layer.weight, DTensor)
    torch.testing.assert_close(full_tensor(layer.base_layer.weight), plain.base_layer.weight)
    torch.testing.assert_close(model(batch(0)), reference(batch(0)))
    layer.unmerge()
    assert torch.equal(full_tensor(layer.base_layer.weight), before)
    # An infinity in one rank's part of the weight stops the merge on every rank.
    if place.rank == 1:
        with torch.no_grad():
            layer.base_layer.weight.to_local()[0, 0] = float("inf")
    before = full_tensor(layer.base_layer.weight).clone()
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert not layer.merged and torch.equal(full_tensor(layer.base_layer.weight), before)


@worlds(2)
def check_tensor_parallelism_is_refused(place: Place):
    """Before an adapter is added and afterwards; FSDP2 cuts base layers alone, too."""
    mesh, x = init_device_mesh("cpu", (place.world,)), batch(0)
    cut = nn.Sequential(nn.Linear(*SIZES), nn.Tanh(), nn.Linear(*SIZES)).double()
    parallelize_module(cut, mesh, {"2": ColwiseParallel()})
    refused = r"has a weight placed \(Shard\(dim=0\),\).*: tensor parallelism is not supported"
    with pytest.raises(ValueError, match=f"base_layer {refused}"):
        RandLoraLinear(cut[2], r=4)
    assert cut[2].weight.requires_grad
    model = make()
    parallelize_module(model, mesh, {"0.base_layer": ColwiseParallel()})
    with pytest.raises(RuntimeError, match=f"base_layer .*24.* {refused}"):
        model(x)

    reference, model = make(), make()
    for layer in (model[0], model[2]):
        fully_shard(layer.base_layer)
    torch.testing.assert_close(model(x), reference(x))


@worlds(2, 4)
def check_training_and_checkpoints(place: Place):
    """Adam as of one process; what 2 processes save is resumed by 2, by 4 and by one."""
    reference, path = make(), place.folder / "fsdp"
    train(reference, adam(reference), range(4))
    if place.world == 2:
        model = sharded()
        optimizer = adam(model)
        train(model, optimizer, range(2), lambda x: share(place, x))
        dcp.save(states(model, optimizer), checkpoint_id=path)
    for model, select in ((make(), lambda x: x), (sharded(), lambda x: share(place, x))):
        optimizer = adam(model)
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        loaded = states(model, optimizer)
        dcp.load(loaded, checkpoint_id=path)
        set_state_dict(model, optimizer, **loaded)
        train(model, optimizer, range(2, 4), select)
        same_parameters(model, reference)
        assert list(model.state_dict()) == list(reference.state_dict())
