"""Checks of tensor parallelism, run by test_distributed.py in 2 and 4 processes."""

import copy
import os
from itertools import product

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_ranks import (
    Place,
    RecordedCollectives,
    adam,
    equal_on_all_ranks,
    full_tensor,
    same_parameters,
    worlds,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

from randlora_ext import RandLoraLinear, apply_randlora, load_adapter, save_adapter
from randlora_ext.distributed import RandLoraColwise, RandLoraRowwise
from randlora_ext.reference import linear_reference

STYLES = (RandLoraColwise, RandLoraRowwise)
# in, out, r, density: odd multiples of 4, overhanging last bases, both packed formats, slices whose
# D is below their d, and a sharded side that ends as large as the other.
SHAPES = (
    (36, 52, 5, 1 / 3),
    (52, 36, 5, 1 / 16),
    (44, 44, 7, 1 / 3),
    (20, 80, 3, 1 / 16),
    (80, 20, 3, 1 / 3),
)
HADAMARD = {"density": None, "basis": "hadamard"}  # any slice: also one that begins in a class
T = 6
EXACT = dict(rtol=1e-11, atol=1e-11)


def layer(n_in, n_out, r=5, density=1 / 3, dtype=torch.float64, **options):
    """An adapted layer with lambda and gamma that are no longer the initial ones."""
    torch.manual_seed(0)
    made = RandLoraLinear(
        nn.Linear(n_in, n_out, dtype=dtype), r, r * 2.0, density, projection_prng_key=9, **options
    )
    for parameter in made.adapter_parameters():
        nn.init.normal_(parameter)
    return made


def diagonals(layer):
    return [p for name, p in layer.named_parameters() if "randlora" in name]


@worlds(2, 4)
def check_parity(place: Place):
    """y, dx, dlam, dgam against the unsharded layer in plain PyTorch; every case of the table."""
    mesh = place.mesh()
    for style in STYLES:
        for n_in, n_out, r, density in SHAPES:
            for path in ("factored", "delta", "merged"):
                same_as_plain(mesh, style, layer(n_in, n_out, r, density), path)
            for path in ("factored", "merged"):
                same_as_plain(mesh, style, layer(n_in, n_out, r, **HADAMARD), path)
        one = place.mesh(place.world, 1, names=("dp", "tp"))["tp"]
        for sizes in SHAPES[:2]:
            same_as_plain(one, style, layer(*sizes), "factored")


def same_as_plain(mesh, style, plain, path):
    sharded = copy.deepcopy(plain)
    os.environ["RANDLORA_PATH"] = path
    parallelize_module(sharded, mesh, style(input_layouts=Replicate(), output_layouts=Replicate()))
    x = torch.randn(2, T // 2, plain.in_features, dtype=torch.float64)
    dy = torch.randn(2, T // 2, plain.out_features, dtype=torch.float64)
    leaves = [t.detach().clone().requires_grad_() for t in (x, *diagonals(plain))]
    A, B = plain.bases["default"].dense(dtype=torch.float64)
    base = plain.base_layer
    want = linear_reference(leaves[0], base.weight, base.bias, A, B, *leaves[1:], 2.0)
    x.requires_grad_()
    got = sharded(x)
    del os.environ["RANDLORA_PATH"]
    torch.testing.assert_close(got, want, **EXACT)
    want.backward(dy)
    got.backward(dy)
    for ours, reference in zip((x, *diagonals(sharded)), leaves, strict=True):
        torch.testing.assert_close(full_tensor(ours.grad), reference.grad, **EXACT)
    assert all(p.grad.placements == p.placements for p in diagonals(sharded))


@worlds(2, 4)
def check_what_a_rank_holds(place: Place):
    """Each rank holds the shares of the basis and of gamma that the sharding table gives."""
    mesh, world = place.mesh(), place.world
    for style, kind in product(STYLES, ({}, HADAMARD)):
        for n_in, n_out in ((36, 52), (52, 36)):
            plain = layer(n_in, n_out, **kind)
            sharded = parallelize_module(copy.deepcopy(plain), mesh, style())
            whole_basis, basis = plain.bases["default"], sharded.bases["default"]
            lam, gam = diagonals(sharded)
            A, B = basis.dense()
            shards_d = (style is RandLoraRowwise) == whole_basis.expand
            assert A.shape == (whole_basis.r, whole_basis.d // (world if shards_d else 1))
            assert B.shape == (whole_basis.D // (1 if shards_d else world), whole_basis.K)
            assert lam.placements == (Replicate(),)
            assert gam.placements == ((Shard(1) if shards_d else Replicate()),)
            assert tuple(gam.shape) == (whole_basis.n, whole_basis.d)
            assert sharded.base_layer.weight.to_local().numel() == n_in * n_out // world
            if kind:
                signs = basis.d + basis.D + basis.K
                assert sum(t.nbytes for t in basis.packed()) == signs


@worlds(2, 4)
def check_communication(place: Place):
    """One reduction of lambda's and gamma's gradients beside what the frozen layer sends anyway."""
    mesh, bytes_of = place.mesh(), 8
    for style in STYLES:
        for n_in, n_out in ((36, 52), (52, 36)):
            plain = layer(n_in, n_out)
            basis = plain.bases["default"]
            sharded = parallelize_module(plain, mesh, style(), src_data_rank=None)
            x = torch.randn(T, n_in if style is RandLoraColwise else n_in // place.world)
            x = x.double().requires_grad_()
            shards_d = (style is RandLoraRowwise) == basis.expand
            numbers = basis.K + (0 if shards_d else basis.n * basis.d)
            with RecordedCollectives() as forward:  # the bases are generated in here
                y = sharded(x)
            with RecordedCollectives() as backward:
                y.sum().backward()
            activations = bytes_of * T * (n_in if style is RandLoraColwise else n_out)
            diagonal = bytes_of * numbers
            if style is RandLoraColwise:
                assert forward.sizes == []
                assert sorted(backward.sizes) == sorted([activations, diagonal])
            else:
                assert forward.sizes == [activations] and backward.sizes == [diagonal]
            with RecordedCollectives() as nothing:
                y = sharded(x.detach())
                y.sum().backward() if style is RandLoraColwise else None
            assert nothing.sizes == ([diagonal] if style is RandLoraColwise else [activations])


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(36, 60, dtype=torch.float64)
        self.down = nn.Linear(60, 36, dtype=torch.float64)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


PLAN = {"up": RandLoraColwise, "down": RandLoraRowwise}


def mlp():
    torch.manual_seed(4)
    model = apply_randlora(Mlp(), ["up"], r=5, randlora_alpha=10, basis="hadamard")
    model = apply_randlora(model, ["down"], r=5, randlora_alpha=10, density=1 / 3)
    for parameter in diagonals(model):
        nn.init.normal_(parameter, std=0.3)
    return model


def sharded_mlp(mesh):
    return parallelize_module(mlp(), mesh, {name: style() for name, style in PLAN.items()})


def zero(parameters):
    for parameter in parameters:
        nn.init.zeros_(parameter)


def train(model, steps, rows=slice(None)):
    optimizer = adam(model)
    for step in range(steps):
        x = torch.randn(8, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        loss = model(x[rows]).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@worlds(2, 4)
def check_training(place: Place):
    """Adam steps of the sharded model follow the whole one's; replicas stay equal bit for bit."""
    reference, model = mlp(), sharded_mlp(place.mesh())
    train(reference, 3)
    train(model, 3)
    same_parameters(model, reference)
    for parameter in diagonals(model):
        if parameter.placements == (Replicate(),):
            assert equal_on_all_ranks(parameter.to_local().detach(), place.world)


@worlds(2, 4)
def check_sequence_parallel(place: Place):
    """Tokens sharded outside the pair of layers: gathered before, reduce-scattered after."""
    mesh, reference, model = place.mesh(), mlp(), mlp()
    tokens = RandLoraColwise(input_layouts=Shard(0)), RandLoraRowwise(output_layouts=Shard(0))
    parallelize_module(model, mesh, dict(zip(PLAN, tokens, strict=True)))
    train(reference, 1)
    share = 8 // place.world
    with RecordedCollectives() as collectives:
        train(model, 1, rows=slice(place.rank * share, (place.rank + 1) * share))
    same_parameters(model, reference)
    assert "reduce_scatter_tensor.default" in [name for name, _ in collectives.sent]


@worlds(2, 4)
def check_checkpoint(place: Place):
    """torch.distributed.checkpoint: one model in any number of processes, or none at all."""
    path = place.folder / "tensor-parallel"
    reference, model = mlp(), sharded_mlp(place.mesh())
    train(reference, 2)
    if place.world == 2:  # the run of 4 processes, and a single one, read what 2 have written
        train(model, 2)
        dcp.save({"model": model.state_dict()}, checkpoint_id=path)
    whole_state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    alone = mlp()
    for each in (model, alone):  # plain tensors take the whole of each DTensor
        zero(each.parameters())
        dcp.load({"model": each.state_dict()}, checkpoint_id=path)
        same_parameters(each, reference)
    assert list(model.state_dict()) == list(alone.state_dict()) == list(reference.state_dict())
    assert not any("basis" in key or "_A" in key or "_B" in key for key in model.state_dict())
    if place.world == 2 and place.rank == 0:  # as one ordinary file, exactly
        for key, value in whole_state.items():
            assert torch.equal(value, alone.state_dict()[key])


@worlds(4)
def check_adapter_file(place: Place):
    """One process's file goes into a model sharded in two ways and comes out again, bit for bit."""
    mesh = place.mesh(2, 2, names=("dp", "tp"))
    model = sharded_mlp(mesh["tp"])
    zero(diagonals(model))
    one, four = (place.folder / f"{name}.safetensors" for name in ("one", "sharded"))
    if place.rank == 0:
        save_adapter(mlp(), one)
    dist.barrier()
    for shard in (lambda: None, lambda: fully_shard(model, mesh=mesh["dp"])):
        shard()
        load_adapter(model, one)
        save_adapter(model, four)
        dist.barrier()
        assert one.read_bytes() == four.read_bytes()
        dist.barrier()


@worlds(4)
def check_with_fsdp(place: Place):
    """Two by two: tensor parallel within, FSDP2 over halves of the batch."""
    mesh = place.mesh(2, 2, names=("dp", "tp"))
    reference, model = mlp(), sharded_mlp(mesh["tp"])
    fully_shard(model, mesh=mesh["dp"])
    model.set_gradient_divide_factor(1.0)  # the loss is a sum
    train(reference, 2)
    half = mesh["dp"].get_local_rank()
    train(model, 2, rows=slice(4 * half, 4 * half + 4))
    same_parameters(model, reference)
