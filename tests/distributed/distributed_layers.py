"""Checks of a tensor-parallel layer, run by test_distributed.py."""

import copy
import os
from itertools import product

import pytest
import torch
import torch.distributed as dist
from distributed_ranks import Place, RecordedCollectives, full_tensor, worlds
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import PrepareModuleInput, parallelize_module

from randlora_ext import RandLoraLinear, load_adapter, save_adapter
from randlora_ext.distributed import (
    RandLoraColwise,
    RandLoraRowwise,
    TensorParallelRandLoraLinear,
)
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


def ends(style):
    return style(input_layouts=Replicate(), output_layouts=Replicate())


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
    parallelize_module(sharded, mesh, ends(style))
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


def pair(place, style, *sizes, **options):
    """(whole layer, sharded layer) of equal numbers."""
    plain = layer(*(sizes or (36, 52)), **options)
    return plain, parallelize_module(copy.deepcopy(plain), place.mesh(), ends(style))


def inputs(plain, dtype=torch.float64):
    return torch.randn(T, plain.in_features, dtype=torch.float64).to(dtype)


def same_gradients(sharded, plain, parameters=diagonals, **limits):
    for ours, theirs in zip(parameters(sharded), parameters(plain), strict=True):
        torch.testing.assert_close(full_tensor(ours.grad), theirs.grad, **(limits or EXACT))


@worlds(2)
def check_adapters(place: Place):
    """A second adapter added after sharding, both at once, none, switching, and copies."""
    for style in STYLES:
        plain, sharded = pair(place, style)
        for each in (plain, sharded):
            torch.manual_seed(5)
            each.update_layer("two", r=4, randlora_alpha=8, basis="hadamard")
        for ours, theirs in (
            (sharded.randlora_lambda["two"], plain.randlora_lambda["two"]),
            (sharded.randlora_gamma["two"], plain.randlora_gamma["two"]),
        ):
            values = torch.randn_like(theirs)
            theirs.data.copy_(values)
            ours.data.copy_(DTensor.from_local(values, place.mesh(), [Replicate()]))
        x = inputs(plain)
        for active in (["default"], ["two"], [], ["default", "two"]):
            for each in (plain, sharded):
                each.set_adapter(active)
            torch.testing.assert_close(sharded(x), plain(x), **EXACT)
        twin = copy.deepcopy(sharded)
        assert type(twin) is TensorParallelRandLoraLinear and torch.equal(twin(x), sharded(x))
        for each in (plain, sharded):
            each(x).sum().backward()
        same_gradients(sharded, plain)
        sharded.disable(), plain.disable()
        torch.testing.assert_close(sharded(x), plain(x), **EXACT)


@worlds(2)
def check_merging(place: Place):
    for style, sizes, kind in FOUR_CASES:
        plain, sharded = pair(place, style, *sizes, **kind)
        deltas = (each.get_delta_weight("default") for each in (sharded, plain))
        torch.testing.assert_close(*map(full_tensor, deltas), **EXACT)
        x = inputs(plain)
        want, before = plain(x), sharded.weight.to_local().clone()
        for keep in ("host", "device", "nothing"):
            with RecordedCollectives() as collectives:
                sharded.merge(keep_weight=keep)
                sharded.unmerge()
            assert collectives.sizes() == []
            assert torch.equal(sharded.weight.to_local(), before) or keep == "nothing"
        sharded.merge(safe_merge=True)
        torch.testing.assert_close(sharded(x), want, **EXACT)
        sharded.unmerge()
        torch.testing.assert_close(sharded(x), want, **EXACT)
        with pytest.raises(ValueError, match="rounding_seed"):
            sharded.merge(rounding_seed=1)
        if place.rank == 1:  # where gamma is replicated this is one rank's mistake, too
            with torch.no_grad():
                sharded.randlora_gamma["default"].to_local().fill_(float("nan"))
        with pytest.raises(ValueError, match="NaN"):
            sharded.merge(safe_merge=True)
        assert not sharded.merged


@worlds(2)
def check_dropout_and_trained_bases(place: Place):
    """Dropout keeps its mean; a base layer that trains along gets its gradients."""
    for style in STYLES:
        plain, sharded = pair(place, style, randlora_dropout=0.5)
        x = torch.ones(4000, 36, dtype=torch.float64)
        difference = sharded(x).mean(0) - plain.eval()(x).mean(0)
        spread = plain(x).mean(0).abs().max()
        assert 1e-6 < difference.abs().max() / spread < 0.5
        torch.testing.assert_close(sharded.eval()(x[:3]), plain(x[:3]), **EXACT)

        plain, sharded = pair(place, style)
        x = inputs(plain)
        for each in (plain, sharded):
            each.base_layer.requires_grad_(True)
            each(x).square().sum().backward()
        same_gradients(sharded, plain, nn.Module.parameters, rtol=1e-9, atol=1e-9)


@worlds(2)
def check_16_bit(place: Place):
    for style, sizes, kind in FOUR_CASES:
        plain, sharded = pair(place, style, *sizes, dtype=torch.bfloat16, **kind)
        x = inputs(plain, torch.bfloat16)
        y, want = sharded(x), plain(x)
        assert y.dtype == torch.bfloat16
        assert (y - want).float().norm() < 0.01 * want.float().norm()
        y.sum().backward(), want.sum().backward()
        for ours, theirs in zip(diagonals(sharded), diagonals(plain), strict=True):
            assert ours.grad.dtype == torch.float32
            assert (full_tensor(ours.grad) - theirs.grad).norm() < 0.01 * theirs.grad.norm()


@worlds(4)
def check_from_shard(place: Place):
    """A rank that has nothing but its own nn.Linear; no weight is sent before forward."""
    mesh = place.mesh()
    for style, sizes, kind in FOUR_CASES:
        plain = layer(*sizes, **kind)
        weight, bias = (p.detach() for p in plain.base_layer.parameters())
        cuts_outputs = style is RandLoraColwise
        weight = weight.chunk(place.world, 0 if cuts_outputs else 1)[place.rank].clone()
        shard = nn.Linear(*reversed(weight.shape), dtype=torch.float64)
        shard.weight.data = weight
        shard.bias.data = bias.chunk(place.world)[place.rank] if cuts_outputs else bias
        with RecordedCollectives() as collectives:
            options = {"r": 5, "randlora_alpha": 10, "projection_prng_key": 9, "density": 1 / 3}
            sharded = ends(style).from_shard(shard, mesh, **(options | kind))
        assert max(collectives.sizes()) < 1000  # the options alone
        assert sharded.base_layer.weight.to_local().data_ptr() == weight.data_ptr()
        assert (sharded.in_features, sharded.out_features) == sizes
        x = inputs(plain)
        # a fresh adapter changes nothing
        torch.testing.assert_close(sharded(x), plain.base_layer(x), **EXACT)
        with torch.no_grad():
            for ours, theirs in zip(diagonals(sharded), diagonals(plain), strict=True):
                ours.copy_(DTensor.from_local(theirs.detach(), mesh, [Replicate()]))
        torch.testing.assert_close(sharded(x), plain(x), **EXACT)


@worlds(4)
def check_refusals(place: Place):
    """What cannot be sharded raises before anything has changed."""
    mesh = place.mesh()
    for style, sizes in ((RandLoraColwise, (36, 54)), (RandLoraRowwise, (54, 36))):
        plain = layer(*sizes)
        with pytest.raises(ValueError, match="must be divisible by the 4 ranks of .*, got 54"):
            parallelize_module(plain, mesh, style())
        assert type(plain) is RandLoraLinear and type(plain.base_layer.weight) is nn.Parameter

        fit = layer(36, 52)
        with pytest.raises(TypeError, match="serves RandLoraLinear, got Linear"):
            parallelize_module(nn.Linear(36, 52), mesh, style())
        with pytest.raises(ValueError, match="one dimension, got 2"):
            style()._apply(fit, place.mesh(2, 2))
        fit.merge()
        with pytest.raises(ValueError, match=r"are merged; unmerge\(\) first"):
            parallelize_module(fit, mesh, style())
        fit.unmerge()
        hook = fit.base_layer.register_forward_hook(lambda *_: None)
        with pytest.raises(TypeError, match="without hooks"):
            parallelize_module(fit, mesh, style())
        hook.remove()
        assert type(fit) is RandLoraLinear
        done = parallelize_module(fit, mesh, style())
        with pytest.raises(TypeError, match="got TensorParallelRandLoraLinear"):
            parallelize_module(done, mesh, style())
        with pytest.raises(TypeError, match="shard must be an nn.Linear"):
            style().from_shard(nn.ReLU(), mesh)


@worlds(2)
def check_ranks_that_differ(place: Place):
    """Sums over ranks would mix two bases."""
    mesh, key = place.mesh(), 9 + place.rank
    differs = "projection_prng_key{} must be equal on all ranks, got 9 on rank 0, 10 on rank 1"
    for style in STYLES:
        plain = layer(36, 52)
        plain.update_layer("two", projection_prng_key=key)
        with pytest.raises(ValueError, match=differs.format(" of adapter 'two'")):
            parallelize_module(plain, mesh, style())
        assert type(plain) is RandLoraLinear and type(plain.base_layer.weight) is nn.Parameter
        _, sharded = pair(place, style)
        with pytest.raises(ValueError, match=differs.format("")):
            sharded.update_layer("two", 4, projection_prng_key=key)
        assert [*sharded.bases] == ["default"]
        plain = layer(36, 52)
        if place.rank == 0:
            plain.merge()
        with pytest.raises(Exception, match=r"are merged; unmerge\(\) first"):  # on both
            parallelize_module(plain, mesh, style())
        assert type(plain) is RandLoraLinear and type(plain.base_layer.weight) is nn.Parameter
        with pytest.raises(Exception, match="shard must be an nn.Linear"):
            style().from_shard(nn.ReLU() if place.rank else nn.Linear(36, 26), mesh)
        with pytest.raises(ValueError, match=differs.format("")):
            style().from_shard(nn.Linear(36, 26), mesh, projection_prng_key=key)


@worlds(2)
def check_a_file_that_one_rank_lacks(place: Place):
    """Every rank raises, and all can go on."""
    (_, sharded), file = pair(place, RandLoraColwise), place.folder / "one-rank"
    here = file if place.rank else file / "no" / "folder"
    with pytest.raises(OSError, match="rank 0: " if place.rank else "cannot be written"):
        save_adapter(sharded, here)
    assert not file.exists()
    dist.barrier()
    save_adapter(sharded, file)
    before = full_tensor(sharded.randlora_gamma["default"].detach().clone())
    with pytest.raises(OSError, match="rank 0: " if place.rank else "no.*folder"):
        load_adapter(sharded, here)
    if place.rank == 1:
        save_adapter(layer(36, 52, r=4), place.folder / "one-rank-1")
    other = file if place.rank == 0 else place.folder / "one-rank-1"
    with pytest.raises(Exception, match="one-rank-1 does not fit"):
        load_adapter(sharded, other)
    load_adapter(sharded, file)
    assert torch.equal(full_tensor(sharded.randlora_gamma["default"]), before)


class Pair(nn.Module):
    """Two layers over one input, as the projections of attention are."""

    def __init__(self):
        super().__init__()
        self.q, self.k = layer(36, 52), layer(36, 20, **HADAMARD)

    def forward(self, x):
        return self.q(x).sum() + self.k(x).sum()


@worlds(2)
def check_a_shared_input(place: Place):
    """dx is reduced once for all layers that are given one DTensor, as with torch's styles."""
    mesh, whole_x = place.mesh(), torch.randn(T, 36, dtype=torch.float64)
    plain, sharded, gradients = Pair(), Pair(), []
    parallelize_module(sharded, mesh, {"q": RandLoraColwise(), "k": RandLoraColwise()})
    layouts = dict(input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),))
    parallelize_module(sharded, mesh, PrepareModuleInput(**layouts))
    for model in (plain, sharded):
        x = whole_x.clone().requires_grad_()
        loss = model(x)
        with RecordedCollectives() as collectives:
            loss.backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, **EXACT)
    # One for dx, and one for lambda and gamma of each layer.
    sizes = collectives.sizes()
    assert len(sizes) == 3 and sizes.count(8 * T * 36) == 1
