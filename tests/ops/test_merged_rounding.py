"""`merged_rounding`: the merged path in 16 bits, on a W + dW that is rounded as the user asked."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from compile_helpers import fresh_dynamo as fresh_dynamo
from compile_helpers import graphs
from layer_cases import (  # noqa: F401
    SIXTEEN_BITS,
    assert_rule,
    exact,
    forward_backward,
    make_layer,
    one_thread,
    plain,
)
from layer_helpers import make_base, randomize
from torch import nn
from torch.utils.checkpoint import checkpoint

from randlora_ext import (
    RandLoraLinear,
    TernaryBasis,
    apply_randlora,
    explain,
    kernels,
    linear,
    load_adapter,
    merged_weight,
    save_adapter,
)
from randlora_ext.ops.path import PATHS, choose, path_regions

DTYPES = pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
ROUNDINGS = pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
# in, out, r, density, kind: every packed form in both orientations, with overhanging last bases.
BASES = {
    "lists": (50, 37, 7, 0.07, "independent"),
    "lists reduce": (37, 50, 7, 0.07, "independent"),
    "planes": (50, 37, 7, 1 / 3, "independent"),
    "planes reduce": (37, 130, 16, 1 / 3, "independent"),
    "block": (24, 40, 8, 1 / 4, "block"),
    "block reduce": (128, 64, 32, 1 / 8, "block"),
}
# Enough tokens for the merged path to be the cheapest of these, in 16 bits, too.
DENSE, MANY = TernaryBasis(64, 64, 8, 1.0), 10**4


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv("RANDLORA_PATH", raising=False)


def make(name, dtype, seed=3, tokens=33):
    in_features, out_features, r, density, kind = BASES[name]
    layer = make_layer(in_features, out_features, r, density, tokens, dtype)
    return replace(layer, basis=TernaryBasis(in_features, out_features, r, density, seed, kind))


def run(layer, rounding, path="merged"):
    return forward_backward(
        lambda x, lam, gam: linear(
            x, layer.weight, layer.bias, layer.basis, lam, gam, layer.scaling, path, rounding
        ),
        layer,
    )


def rounded(layer, seed):
    arguments = layer.basis, layer.weight, layer.lam, layer.gam, layer.scaling
    return merged_weight(*arguments, rounding_seed=seed)


@DTYPES
@ROUNDINGS
@pytest.mark.parametrize("name", BASES)
def test_forward_and_backward_multiply_by_the_rounded_weight(name, rounding, dtype):
    for seed in (3, 2**64 - 1):
        layer = make(name, dtype, seed)
        weight = rounded(layer, seed if rounding == "stochastic" else None)
        got = run(layer, rounding)
        assert torch.equal(got["y"], F.linear(layer.x, weight, layer.bias))
        assert torch.equal(got["dx"], layer.dy @ weight)
        # The gradients of lambda and gamma never see W.
        gradients = {n: got[n] for n in ("dlam", "dgam")}
        assert_rule(gradients, plain(layer), exact(layer), dtype)
    assert not torch.equal(rounded(layer, None), rounded(layer, seed))  # the test tells them apart


@DTYPES
def test_an_imported_basis_has_the_seed_0(dtype):
    layer = make("planes", dtype)
    A, B = layer.basis.dense()
    layer.basis = TernaryBasis.from_dense(A, B, 50, 37)
    y = run(layer, "stochastic")["y"]
    assert torch.equal(y, F.linear(layer.x, rounded(layer, 0), layer.bias))


@DTYPES
def test_the_merged_path_without_the_option_rounds_to_nearest(dtype, monkeypatch):
    layer = make("lists", dtype)
    nearest = run(layer, "nearest")
    for name, value in run(layer, None).items():
        assert torch.equal(value, nearest[name])
    monkeypatch.setenv("RANDLORA_PATH", "merged")
    for rounding in (None, "nearest", "stochastic"):
        got, want = run(layer, rounding, "auto"), run(layer, rounding)
        assert all(torch.equal(got[name], want[name]) for name in got)


@pytest.mark.parametrize("path", [*PATHS, "auto"])
@pytest.mark.parametrize("name", BASES)
def test_other_paths_and_wider_types_ignore_it(name, path):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        if dtype == torch.bfloat16 and path in ("merged", "auto"):
            continue
        layer = make(name, dtype)
        want = run(layer, None, path)
        for rounding in ("nearest", "stochastic"):
            got = run(layer, rounding, path)
            assert all(torch.equal(got[n], want[n]) for n in got)


# ---- the choice of a path


@DTYPES
@ROUNDINGS
def test_auto_chooses_by_cost_among_all_paths(dtype, rounding):
    assert explain(DENSE, MANY, dtype).path == "delta"
    choice = explain(DENSE, MANY, dtype, merged_rounding=rounding)
    assert choice.path == "merged" and rounding in choice.reason
    assert choice.costs["merged"] == min(choice.costs.values())
    assert explain(DENSE, 1, dtype, merged_rounding=rounding).path == "factored"
    assert explain(DENSE, MANY, dtype, dropout=0.1, merged_rounding=rounding).path == "delta"
    for device in ("cpu", "cuda"):
        arguments = dtype, True, device
        for tokens in (1, 100, 500, MANY):
            chosen, _ = choose("auto", DENSE, tokens, *arguments, rounding)
            want = explain(DENSE, tokens, dtype, device, merged_rounding=rounding).path
            assert chosen == want
    paths = {r.path for r in path_regions(DENSE, dtype, True, "cpu", None, rounding)}
    assert paths == {"factored", "merged"}
    assert {r.path for r in path_regions(DENSE, dtype, True, "cpu")} == {"factored", "delta"}


@ROUNDINGS
@pytest.mark.parametrize("density, kind", [(1.0, "independent"), (1 / 4, "block")])
def test_auto_is_the_path_that_explain_names(density, kind, rounding):
    basis = TernaryBasis(64, 64, 16, density, 5, kind)
    layer = replace(make_layer(64, 64, 16, 1.0, MANY, torch.bfloat16), basis=basis)
    assert explain(basis, MANY, torch.bfloat16, merged_rounding=rounding).path == "merged"
    got, want = run(layer, rounding, "auto"), run(layer, rounding, "merged")
    assert all(torch.equal(got[n], want[n]) for n in got)
    exact_path = explain(basis, MANY, torch.bfloat16).path
    assert exact_path != "merged"
    assert torch.equal(run(layer, None, "auto")["y"], run(layer, None, exact_path)["y"])


def test_plain_torch_has_no_merged_path(monkeypatch):
    layer = make("block", torch.bfloat16)
    layer.basis.packed(), layer.basis.dense_b("cpu", torch.bfloat16)
    monkeypatch.setattr(kernels, "serve", lambda device_type: False)
    monkeypatch.setattr("randlora_ext.ops.functional.serve", lambda device_type: False)
    want = run(layer, None, "auto")
    for rounding in ("nearest", "stochastic"):
        choice = explain(layer.basis, MANY, torch.bfloat16, merged_rounding=rounding)
        assert choice.path == "factored" and choice.isa == "plain torch"
        assert "merged_rounding is ignored" in str(choice)
        got = run(layer, rounding, "auto")
        assert all(torch.equal(got[n], want[n]) for n in got)
    assert "ignored" not in explain(layer.basis, MANY).reason


@pytest.mark.parametrize("value", ["Nearest", "", True, 0, "stochastic "])
def test_bad_values(value):
    layer = make("lists", torch.bfloat16)
    net = nn.Sequential(nn.Linear(8, 8))
    adapted = RandLoraLinear(nn.Linear(8, 8), r=2)
    for call in (
        lambda: run(layer, value),
        lambda: explain(layer.basis, 1, merged_rounding=value),
        lambda: RandLoraLinear(nn.Linear(8, 8), r=2, merged_rounding=value),
        lambda: adapted.update_layer("other", r=2, merged_rounding=value),
        lambda: apply_randlora(net, ["0"], r=2, merged_rounding=value),
    ):
        with pytest.raises(ValueError, match="merged_rounding must be") as raised:
            call()
        assert all(f"{word!r}" in str(raised.value) for word in ("nearest", "stochastic", value))
    assert type(net[0]) is nn.Linear and [*adapted.bases] == ["default"]


# ---- in every way in which torch calls an operator


def make_net(seeds=(3, 2**63 + 5), rounding="stochastic", **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24)).bfloat16()
    for i, seed in zip((0, 2), seeds, strict=True):
        layer = RandLoraLinear(
            net[i], 8, projection_prng_key=seed, merged_rounding=rounding, **options
        )
        net[i] = randomize(layer, seed=i)
    return net


def gradients(model, x):
    y = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y.float().square().sum(), trained)]


def x_of(tokens):
    return torch.randn(tokens, 24, generator=torch.Generator().manual_seed(1)).bfloat16()


KINDS = pytest.mark.parametrize(
    "options", [{"density": 0.1}, {"density": 1 / 4, "basis": "block"}], ids=["lists", "block"]
)


@KINDS
@pytest.mark.usefixtures("fresh_dynamo")
def test_compile(monkeypatch, options):
    monkeypatch.setenv("RANDLORA_PATH", "merged")
    nets = {rounding: make_net(rounding=rounding, **options) for rounding in (None, "stochastic")}
    results = {}
    for rounding, net in nets.items():
        fast = torch.compile(net, fullgraph=True, backend="aot_eager")
        for tokens in (7, 9, 40):
            results[rounding] = gradients(fast, x_of(tokens))
            want = gradients(net, x_of(tokens))
            assert all(map(torch.equal, results[rounding], want))
        assert graphs() <= 2 * len(results)
    assert not torch.equal(results[None][0], results["stochastic"][0])
    for i in (0, 2):
        nets[None][i].merged_rounding["default"] = "stochastic"  # compiled code notices
    assert torch.equal(gradients(fast, x_of(40))[0], results["stochastic"][0])


@KINDS
def test_export(monkeypatch, options):
    monkeypatch.setenv("RANDLORA_PATH", "merged")
    net, x = make_net(**options), x_of(9)
    shapes = ({0: torch.export.Dim("T", min=2, max=512)},)
    program = torch.export.export(net, (x,), dynamic_shapes=shapes)
    nodes = [n for n in program.graph.nodes if "randlora.linear" in str(n.target)]
    assert [n.args[-1] for n in nodes] == [3, 2**63 + 5 - 2**64]
    assert torch.equal(program.module()(x_of(20)), net(x_of(20)))


@KINDS
def test_checkpoint_func_and_autocast(monkeypatch, options):
    monkeypatch.setenv("RANDLORA_PATH", "merged")
    net, x = make_net(**options), x_of(6)
    want = gradients(net, x)
    again = gradients(lambda_module(net, lambda x: checkpoint(net, x, use_reentrant=False)), x)
    assert all(map(torch.equal, again, want))

    state = {n: p.detach() for n, p in net.named_parameters()}
    loss = lambda state: torch.func.functional_call(net, state, x).float().square().sum()  # noqa: E731
    by_func = torch.func.grad(loss)(state)
    names = [n for n, p in net.named_parameters() if p.requires_grad]
    assert all(torch.equal(by_func[n], g) for n, g in zip(names, want[1:], strict=True))
    rows = torch.func.vmap(net)(x.view(3, 2, 24))
    assert torch.equal(rows.flatten(0, 1), want[0])

    wide = make_net(**options).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = wide(x.float())
    low = net(x)  # the base weights and diagonals of `net` are exact in bfloat16
    assert y.dtype == torch.bfloat16
    assert (y - low).abs().max() <= 0.02 * low.abs().max()


def lambda_module(net, function):
    module = nn.Module()
    module.net, module.forward = net, function
    return module


def test_opcheck():
    for name in BASES:
        layer = make(name, torch.bfloat16, tokens=3)
        basis = layer.basis
        packed = basis.packed("cpu")
        if basis.kind == "block":
            packed = [*packed, basis.dense_b("cpu", torch.bfloat16)]
        x, lam, gam = (t.requires_grad_() for t in (layer.x, layer.lam, layer.gam))
        rest = lam, gam, packed, basis.scale
        arguments = x, layer.weight, layer.bias, *rest, basis.out_features, "merged", None, 7
        torch.library.opcheck(torch.ops.randlora.linear.default, arguments)


# ---- layers


@ROUNDINGS
def test_layer(rounding):
    base = make_base(64, 64, dtype=torch.bfloat16)
    layer = randomize(RandLoraLinear(base, r=8, density=1.0, merged_rounding=rounding))
    layer.update_layer("exact", r=8, density=1.0)
    assert layer.merged_rounding == {"default": rounding, "exact": None}
    x = torch.randn(MANY, 64).bfloat16()
    arguments = base.weight, base.bias, layer.bases["default"]
    diagonals = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
    want = linear(x, *arguments, *diagonals, layer.scaling["default"], "merged", rounding)
    assert torch.equal(layer(x), want)
    layer.merged_rounding["default"] = None
    assert not torch.equal(layer(x), want)


def test_layer_tells_its_path():
    base = make_base(64, 64, dtype=torch.bfloat16)
    layer = RandLoraLinear(base, r=4, density=1.0)
    assert "path merged" not in repr(layer)
    layer.merged_rounding["default"] = "nearest"
    assert "path merged" in repr(layer)


def test_files_do_not_hold_it(tmp_path):
    net = nn.Sequential(nn.Linear(24, 40)).bfloat16()
    apply_randlora(net, ["0"], r=4, merged_rounding="nearest")
    assert net[0].merged_rounding == {"default": "nearest"}
    save_adapter(net, tmp_path / "adapter.safetensors")
    fresh = load_adapter(nn.Sequential(nn.Linear(24, 40)), tmp_path / "adapter.safetensors")
    assert fresh[0].merged_rounding == {"default": None}
    load_adapter(net, tmp_path / "adapter.safetensors")
    assert net[0].merged_rounding == {"default": "nearest"}
