"""Checks of tensor parallelism, run by test_distributed.py in 2 and 4 processes."""

import copy
import os
from itertools import product

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_data_parallel import batch, make, sharded, share, train
from distributed_ranks import (
    Place,
    RecordedCollectives,
    adam,
    equal_on_all_ranks,
    full_tensor,
    same_parameters,
    trained,
    worlds,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

from randlora_ext import RandLoraLinear, load_adapter, save_adapter
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
PATHS = ("factored", "delta", "merged")
HADAMARD = {"density": None, "basis": "hadamard"}  # any slice: also one that begins in a class
# The four cases of the table, each kind of bases in every style and every orientation.
FOUR_CASES = (
    (RandLoraColwise, (36, 52), {}),
    (RandLoraColwise, (52, 36), HADAMARD),
    (RandLoraRowwise, (36, 52), HADAMARD),
    (RandLoraRowwise, (52, 36), {}),
)
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
    mesh, two = place.mesh(), place.world == 2
    for at, (style, (n_in, n_out, r, density)) in enumerate(product(STYLES, SHAPES)):
        for path in PATHS if two else [PATHS[at % 3]]:
            same_as_plain(mesh, style, layer(n_in, n_out, r, density), path)
        for path in PATHS[::2] if two else [PATHS[::2][at % 2]]:
            same_as_plain(mesh, style, layer(n_in, n_out, r, **HADAMARD), path)
    one = place.mesh(place.world, 1, names=("dp", "tp"))["tp"]
    for style in STYLES:
        same_as_plain(one, style, layer(36, 52), "factored")


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


@worlds(4)
def check_what_a_rank_holds_and_sends(place: Place):
    """Its shares of the basis and of gamma; one reduction of the gradients beside x's or y's."""
    mesh, world = place.mesh(), place.world
    for style, (n_in, n_out), kind in FOUR_CASES:
        plain, cuts_outputs = layer(n_in, n_out, **kind), style is RandLoraColwise
        whole, cuts_d = plain.bases["default"], cuts_outputs != plain.bases["default"].expand
        sharded = parallelize_module(plain, mesh, style(), src_data_rank=None)
        basis, (lam, gam) = sharded.bases["default"], diagonals(sharded)
        A, B = basis.dense()
        assert A.shape == (whole.r, whole.d // (world if cuts_d else 1))
        assert B.shape == (whole.D // (1 if cuts_d else world), whole.K)
        assert lam.placements == (Replicate(),)
        assert gam.placements == ((Shard(1) if cuts_d else Replicate()),)
        assert tuple(gam.shape) == (whole.n, whole.d)
        assert sharded.base_layer.weight.to_local().numel() == n_in * n_out // world
        if kind:
            assert sum(t.nbytes for t in basis.packed()) == basis.d + basis.D + basis.K  # signs

        x = torch.randn(T, n_in if cuts_outputs else n_in // world).double()
        activations = 8 * T * (n_in if cuts_outputs else n_out)
        gradients = 8 * (whole.K + (0 if cuts_d else whole.n * whole.d))
        for wants_dx in (True, False):
            with RecordedCollectives() as forward:  # the bases are generated in here
                y = sharded(x.requires_grad_(wants_dx))
            with RecordedCollectives() as backward:
                y.sum().backward()
            assert forward.sizes() == ([] if cuts_outputs else [activations])
            sums = {gradients, activations} if cuts_outputs and wants_dx else {gradients}
            assert sorted(backward.sizes()) == sorted(sums)


def tensor_parallel(mesh, first=(), second=()):
    """Hadamard bases, cut by inputs, after independent ones, cut by outputs."""
    plan = {"0": RandLoraColwise(**dict(first)), "2": RandLoraRowwise(**dict(second))}
    return parallelize_module(make(), mesh, plan)


@worlds(4)
def check_sequence_parallel(place: Place):
    """Tokens sharded outside the pair of layers: gathered before, reduce-scattered after."""
    tokens = {"input_layouts": Shard(0)}, {"output_layouts": Shard(0)}
    reference, model = make(), tensor_parallel(place.mesh(), *tokens)
    reference(batch(0)).square().sum().backward()
    with RecordedCollectives() as collectives:
        model(share(place, batch(0))).square().sum().backward()
    assert collectives.sizes("reduce_scatter_tensor.default")
    for ours, theirs in zip(trained(model), trained(reference), strict=True):
        torch.testing.assert_close(full_tensor(ours.grad), theirs.grad, rtol=1e-9, atol=1e-9)


@worlds(2, 4)
def check_training_and_checkpoints(place: Place):
    """Adam as of one process; model and optimizer, saved by 2, are resumed by 2, by 4 and by one.

    Replicas stay equal bit for bit.
    """
    reference, mesh = make(), place.mesh()
    train(reference, adam(reference), range(4))
    for name, build, select in (
        ("fsdp", sharded, lambda x: share(place, x)),
        ("tensor-parallel", lambda: tensor_parallel(mesh), lambda x: x),
    ):
        path = place.folder / name
        if place.world == 2:
            model = build()
            optimizer = adam(model)
            train(model, optimizer, range(2), select)
            dcp.save(states(model, optimizer), checkpoint_id=path)
        for model, rows in ((make(), lambda x: x), (build(), select)):
            optimizer = adam(model)
            zero(model.parameters())
            loaded = states(model, optimizer)
            dcp.load(loaded, checkpoint_id=path)
            set_state_dict(model, optimizer, **loaded)
            train(model, optimizer, range(2, 4), rows)
            same_parameters(model, reference)
            assert list(model.state_dict()) == list(reference.state_dict())
    for parameter in diagonals(model):
        if parameter.placements == (Replicate(),):
            assert equal_on_all_ranks(parameter.to_local().detach(), place.world)


def states(model, optimizer):
    names = ("model_state_dict", "optim_state_dict")
    return dict(zip(names, get_state_dict(model, optimizer), strict=True))


def zero(parameters):
    for parameter in parameters:
        nn.init.zeros_(parameter)


@worlds(4)
def check_with_fsdp(place: Place):
    """Two by two: tensor parallel within, FSDP2 over halves of the batch; one process's file."""
    mesh = place.mesh(2, 2, names=("dp", "tp"))
    reference, model = make(), tensor_parallel(mesh["tp"])
    one, four = (place.folder / f"{name}.safetensors" for name in ("one", "sharded"))
    if place.rank == 0:
        save_adapter(reference, one)
    dist.barrier()
    for shard in (lambda: None, lambda: fully_shard(model, mesh=mesh["dp"])):
        shard()
        zero(diagonals(model))
        load_adapter(model, one)
        save_adapter(model, four)
        dist.barrier()
        assert one.read_bytes() == four.read_bytes()
        dist.barrier()
    train(reference, adam(reference), range(2))
    train(model, adam(model), range(2), lambda x: x.chunk(2)[mesh["dp"].get_local_rank()])
    same_parameters(model, reference)
