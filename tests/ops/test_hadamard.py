"""Hadamard bases: what only they have. Files beside this one try them with the other kinds.

Sizes that are no powers of two, slices, the range of float16, long transforms, the operators' own
checks, and plain torch for devices without kernels.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from layer_cases import (  # noqa: F401
    SIXTEEN_BITS,
    Layer,
    assert_delta_weight,
    assert_rule,
    exact,
    forward_backward,
    largest_error,
    make_basis,
    make_layer,
    one_thread,
    ours,
    plain,
    rms_error,
)
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from randlora_ext import delta_weight, linear, merged_weight
from randlora_ext.ops import hadamard as module
from randlora_ext.reference import delta_weight_reference, scaled_basis_reference

ops = torch.ops.randlora
NAMES = ("y", "dx", "dlam", "dgam")
ALL_TYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *SIXTEEN_BITS], ids=str)
PATHS = pytest.mark.parametrize("path", ["factored", "merged"])
# in, out, r: r that is no power of two and does not divide d, r > d, one class, one column, K above
# D, D above N, rows of B that meet again (D > N), n about the vector lengths, K not far above 2^k.
SIZES = [
    (512, 512, 32),
    (192, 576, 32),
    (1536, 576, 32),
    (64, 96, 8),
    (300, 420, 30),
    (61, 100, 6),
    (50, 50, 7),
    (10, 11, 3),
    (1, 1, 4),
    (9, 7, 50),
    (130, 61, 7),
    (40, 512, 2),
    (1, 37, 1),
    (5, 6, 1),
    (129, 131, 8),
    (17, 700, 3),
]
ODD = pytest.mark.parametrize("size", SIZES, ids=str)


def constants(layer):
    return module.operands(layer.basis, layer.x.device, layer.scaling)


def plain_torch(layer, merge=False):
    """y and the gradients by the functions for devices without kernels."""
    inputs = layer.x, layer.weight, layer.bias, layer.lam, layer.gam, *constants(layer), merge
    x, weight, _, *rest = inputs
    results = (
        module._plain_linear(*inputs),
        *module._plain_linear_backward(layer.dy, x, weight, *rest, True, True),
    )
    return dict(zip(NAMES, results, strict=True))


# ---- numbers


@ODD
@ALL_TYPES
def test_odd_sizes(size, dtype):
    for tokens, lead in ((1, ()), (5, (3,)), (130, ()), (0, ()), (0, (2,))):
        whole = make_layer(*size, "hadamard", tokens, dtype, lead)
        for layer in (whole, replace(whole, bias=None), whole.without_weight()):
            oracle = exact(layer)
            results = {"kernels": ours(layer, "factored"), "plain torch": plain_torch(layer)}
            if layer.weight is not None and dtype.itemsize > 2:
                results["merged"] = ours(layer, "merged")
            for how, result in results.items():
                assert all(result[n].shape == oracle[n].shape for n in NAMES), how
                if dtype == torch.float64:
                    worst = max(largest_error(result[n], oracle[n]) for n in NAMES)
                    assert worst < 1e-12, (how, worst)
                else:
                    floor = 4 if dtype == torch.float32 else 2
                    if min(size[:2]) == 1:  # all of dlam is one sum, which may cancel
                        floor = 64
                    assert_rule(result, plain(layer), oracle, dtype, floor)


@ODD
@ALL_TYPES
def test_delta_weight_and_merged_weight(size, dtype):
    layer = make_layer(*size, "hadamard", 1, dtype).cast(dtype)
    if dtype == torch.float64:
        dense, shape = layer.basis.dense(dtype=dtype), layer.weight.shape
        dW = delta_weight_reference(*dense, layer.lam, layer.gam, 0.5, *shape)
        assert largest_error(delta_weight(layer.basis, layer.lam, layer.gam, 0.5), dW) < 1e-12
    else:
        assert_delta_weight(layer, dtype)
    weight, wide = layer.weight, torch.promote_types(dtype, torch.float32)
    total = weight.to(wide) + delta_weight(layer.basis, layer.lam.to(wide), layer.gam.to(wide), 0.5)
    for result in (
        merged_weight(layer.basis, weight, layer.lam, layer.gam, 0.5),
        module._plain_weight(
            weight, layer.lam, layer.gam, *constants(replace(layer, scaling=0.5)), None
        ),
    ):
        assert result.dtype == dtype and result.is_contiguous()
        error = (result.to(wide) - total).abs()
        assert (error <= torch.finfo(dtype).eps * total.abs() + 4e-6 * total.abs().max()).all()
    if dtype.itemsize == 2:
        expected = ops.add_rounded(weight, total - weight.to(wide), 5)
        seeded = merged_weight(layer.basis, weight, layer.lam, layer.gam, 0.5, 5)
        # The words depend on seed and element alone: what differs are sums on an edge.
        assert (seeded != expected).double().mean() < 0.01
        assert not torch.equal(seeded, total.to(dtype)) or weight.numel() < 50


@pytest.mark.parametrize("sizes", [(4096, 4096), (4096, 4608), (4608, 4096)], ids=str)
@pytest.mark.parametrize("how", ["kernels", "plain torch"])
def test_a_large_activation_in_float16_stays_finite(sizes, how):
    # Language models have activations of some thousands in a few features. lambda = 1 and
    # gamma = 1 / d, as at the start: y is small, and so must be everything between.
    layer = make_layer(*sizes, 32, "hadamard", 2, torch.float16).without_weight()
    basis = layer.basis
    x, dy = torch.zeros_like(layer.x), torch.zeros_like(layer.dy)
    x[0, 7], x[1] = 5000, layer.x[1]
    dy[0], dy[1, 5] = layer.dy[0] / 100, 5000
    layer = replace(
        layer,
        x=x,
        dy=dy,
        lam=torch.ones(basis.r, basis.n),
        gam=torch.full((basis.n, basis.d), 1 / basis.d),
        scaling=1.0,
    )
    results = ours(layer, "factored") if how == "kernels" else plain_torch(layer)
    oracle = exact(layer)
    for name in NAMES:
        assert results[name].isfinite().all(), name
        assert rms_error(results[name], oracle[name]) < 2e-3, name


def test_small_diagonals_in_float16():
    # lambda * gamma of 1e-7, as early in training, is about float16's smallest number.
    layer = make_layer(256, 300, 16, "hadamard", 40, torch.float16).without_weight()
    layer.lam, layer.gam, layer.scaling = layer.lam * 1e-4, layer.gam / 16, 5e4
    oracle = exact(layer)
    for name, value in ours(layer, "factored").items():
        assert rms_error(value, oracle[name]) < 2e-3, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(1024, 1024, 8), (700, 1500, 5), (1500, 700, 5)], ids=str)
def test_any_number_of_threads_gives_the_same_bits(size, dtype):
    for tokens in (1, 63, 300):
        layer = make_layer(*size, "hadamard", tokens, dtype).without_weight()
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ours(layer, "factored"))
        for other, name in itertools.product(results[1:], NAMES):
            if dtype == torch.bfloat16 and layer.basis.n % 32:  # torch's own products differ here
                assert rms_error(other[name], results[0][name]) < 1e-3, (name, tokens)
            else:
                assert torch.equal(other[name], results[0][name]), (name, tokens)


@PATHS
@pytest.mark.parametrize("shape", [(50, 37, 7), (37, 50, 7)], ids=str)
def test_a_token_does_not_depend_on_the_others(shape, path):
    # Between batches of other sizes torch's products of the classes may add in another order.
    layer = make_layer(*shape, "hadamard", 40, torch.float32)
    whole = ours(layer, path)
    for row in (0, 17, 39):
        others = torch.arange(40) != row
        changed = replace(layer, x=layer.x.clone(), dy=layer.dy.clone())
        changed.x[others], changed.dy[others] = 7.0, -3.0
        result = ours(changed, path)
        assert torch.equal(result["y"][row], whole["y"][row])
        assert torch.equal(result["dx"][row], whole["dx"][row])
        alone = ours(replace(layer, x=layer.x[row : row + 1], dy=layer.dy[row : row + 1]), path)
        for name in ("y", "dx"):
            torch.testing.assert_close(alone[name][0], whole[name][row], rtol=1e-5, atol=1e-5)


# ---- slices


# in, out, r, inputs, outputs: one side cut, within classes and between them, to less than a class.
CUTS = {
    "d cut in classes": (72, 80, 7, range(5, 48), range(80)),
    "d cut between classes": (72, 80, 6, range(24, 48), range(80)),
    "less than a class": (72, 80, 7, range(25, 31), range(80)),
    "one column": (72, 80, 7, range(71, 72), range(80)),
    "the last columns": (72, 80, 7, range(60, 72), range(80)),
    "D cut": (72, 200, 7, range(72), range(100, 200)),
    "D cut to one row": (72, 200, 7, range(72), range(199, 200)),
    "D cut beyond N": (5, 300, 2, range(5), range(290, 300)),
    "D cut about N": (30, 300, 2, range(30), range(20, 290)),
    "reduce, d cut": (200, 72, 7, range(200), range(13, 40)),
    "reduce, D cut": (200, 72, 7, range(130, 200), range(72)),
    "both cut": (72, 80, 7, range(24, 70), range(5, 45)),
}


def layer_of(part, dtype):
    """A call on a slice, and the same by plain torch in any dtype."""
    make = torch.Generator().manual_seed(1)
    wide = torch.promote_types(dtype, torch.float32)
    n_in, n_out = part.in_features, part.out_features
    sizes = (5, n_in), (n_out, n_in), (part.r, part.n), (part.n, part.d), (5, n_out)
    x, W, lam, gam, dy = (torch.randn(size, generator=make, dtype=torch.float64) for size in sizes)
    layer = Layer(
        part, x.to(dtype), W.to(dtype), None, lam.to(wide), (gam / part.K).to(wide), dy.to(dtype), 2
    )
    A, B = part.dense(dtype=torch.float64)

    def reference(dtype):
        def function(x, lam, gam):
            M = 2.0 * B.to(dtype) @ scaled_basis_reference(A.to(dtype), lam, gam)
            return F.linear(x, layer.weight.to(dtype)) + F.linear(x, M if part.expand else M.T)

        return forward_backward(function, layer.cast(dtype))

    return layer, reference


def assert_slice(layer, reference, dtype):
    oracle = reference(torch.float64)
    ways = {"kernels": ours(layer, "factored"), "plain torch": plain_torch(layer)}
    if dtype.itemsize > 2:
        ways["merged"] = ours(layer, "merged")
    for how, results in ways.items():
        if dtype == torch.float64:
            assert max(largest_error(results[n], oracle[n]) for n in NAMES) < 1e-11, how
        else:
            assert_rule(results, reference(dtype), oracle, dtype, floor=8)


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@ALL_TYPES
def test_slices(cut, dtype):
    n_in, n_out, r, inputs, outputs = cut
    whole = make_basis(n_in, n_out, r, "hadamard")
    part = whole.slice(inputs, outputs)
    layer, reference = layer_of(part, dtype)
    assert_slice(layer, reference, dtype)
    # The same part of the whole layer's dW, wherever the slice begins.
    columns = inputs if whole.expand else outputs
    lam, gam = layer.lam.double(), torch.zeros(whole.n, whole.d, dtype=torch.float64)
    gam[:, columns.start : columns.stop] = layer.gam
    dW = delta_weight_reference(*whole.dense(dtype=lam.dtype), lam, gam, 2.0, n_out, n_in)
    dW = dW[outputs.start : outputs.stop, inputs.start : inputs.stop]
    assert rms_error(delta_weight(part, layer.lam, layer.gam, 2.0), dW) < 2e-6
    merged = merged_weight(part, layer.weight, layer.lam, layer.gam, 2.0).double()
    total = layer.weight.double() + dW
    assert ((merged - total).abs() <= torch.finfo(dtype).eps * total.abs() + 1e-6).all()
    if dtype == torch.float64:
        leaves = [t.requires_grad_() for t in (layer.x, layer.lam, layer.gam)]
        assert torch.autograd.gradcheck(
            lambda x, lam, gam: linear(x, None, None, part, lam, gam, 2.0, "factored"), leaves
        )


@pytest.mark.parametrize("turned", [False, True])
@ALL_TYPES
def test_transforms_of_more_than_65536(dtype, turned):
    # K is 70,005 and N 131,072; a small part of that layer has an oracle that fits in memory.
    part = make_basis(70_001, 70_003, 5, "hadamard")
    part = part.slice(range(30_000, 30_060), range(69_950, 70_003))
    part = part.transposed() if turned else part
    assert part.K > 65_536
    assert_slice(*layer_of(part, dtype), dtype)


# ---- the operators themselves


def call(name, layer, **changes):
    """The operator on the layer's tensors, some of which are replaced."""
    s, row, col, scale, first_row, first_column, expand = constants(layer)
    values = {
        "dy": layer.dy, "x": layer.x, "weight": layer.weight, "bias": layer.bias,
        "lam": layer.lam, "gam": layer.gam, "s": s, "row": row, "col": col, "scale": scale,
        "first_row": first_row, "first_column": first_column, "expand": expand, "merge": False,
        "need_x": True, "need_diagonals": True, "rounding_seed": None, **changes,
    }  # fmt: skip
    op = getattr(ops, name)
    names = [argument.name for argument in op.default._schema.arguments]
    assert set(changes) <= set(names)
    return op.default, tuple(values[k] for k in names)


OPERATORS = ("hadamard_linear", "hadamard_linear_backward", "hadamard_weight")


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("shape", [(9, 5, 2), (5, 9, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(shape, merge, dtype):
    layer = make_layer(*shape, "hadamard", 3, dtype, lead=(1,))
    for needs in ((True, True), (True, False), (False, True)):
        change = dict(zip(("need_x", "need_diagonals"), needs, strict=True))
        torch.library.opcheck(*call("hadamard_linear_backward", layer, merge=merge, **change))
    for weight in (None, layer.weight):
        torch.library.opcheck(*call("hadamard_weight", layer, weight=weight))
    if dtype == torch.bfloat16:
        torch.library.opcheck(*call("hadamard_weight", layer, rounding_seed=5))
    strided = layer.x.mT.contiguous().mT
    torch.library.opcheck(*call("hadamard_linear", layer, x=strided, merge=merge))
    for leaf in (layer.x, layer.lam, layer.gam):
        leaf.requires_grad_()
    torch.library.opcheck(*call("hadamard_linear", layer, merge=merge))
    if not merge:
        torch.library.opcheck(*call("hadamard_linear", layer, weight=None, bias=None))


# in = 8, out = 6, r = 3: d = 6, D = 8, n = 2, K = 6
WRONG = [
    (OPERATORS, {"lam": torch.ones(6)}, ["lam"]),
    (OPERATORS, {"lam": torch.ones(3, 2).int()}, ["lam", "int32"]),
    (OPERATORS, {"lam": torch.ones(2, 2)}, ["col", "4"]),
    (OPERATORS, {"gam": torch.ones(2, 5)}, ["gam", "(2, 6)", "(2, 5)"]),
    (OPERATORS, {"gam": torch.ones(2, 6).int()}, ["gam", "int32"]),
    (OPERATORS, {"gam": torch.ones(2, 6, device="meta")}, ["gam", "meta", "cpu"]),
    (OPERATORS, {"s": torch.ones(5).char()}, ["gam", "(2, 5)", "(2, 6)"]),
    (OPERATORS, {"s": torch.ones(6)}, ["s", "int8", "float32"]),
    (OPERATORS, {"s": torch.ones(12).char()[::2]}, ["s", "contiguous"]),
    (OPERATORS, {"s": torch.ones(6).char().to("meta")}, ["s", "meta", "cpu"]),
    (OPERATORS, {"row": torch.ones(8).short()}, ["row", "int8", "int16"]),
    (OPERATORS, {"row": torch.ones(2, 4).char()}, ["row", "(2, 4)"]),
    (OPERATORS, {"row": torch.ones(0).char()}, ["row"]),
    (OPERATORS, {"col": torch.ones(7).char()}, ["col", "6", "7"]),
    (OPERATORS, {"first_row": -1}, ["first_row", "-1"]),
    (OPERATORS, {"first_column": -1}, ["first_column", "-1"]),
    (OPERATORS, {"first_column": 1}, ["first_column", "[0, 0]", "1"]),
    (OPERATORS[:2], {"x": torch.ones(4, 7)}, ["x", "8", "(4, 7)"]),
    (OPERATORS[:2], {"x": torch.ones(4, 8).int()}, ["x", "int32"]),
    (OPERATORS[:2], {"x": torch.ones(4, 8).half()}, ["float16", "float32"]),
    (OPERATORS, {"weight": torch.ones(8, 6)}, ["weight", "(6, 8)", "(8, 6)"]),
    (OPERATORS, {"weight": torch.ones(6, 8, device="meta")}, ["weight", "meta", "cpu"]),
    (OPERATORS[:2], {"weight": torch.ones(6, 8).double()}, ["weight", "float64", "float32"]),
    (OPERATORS[2:], {"weight": torch.ones(6, 8).int()}, ["weight", "int32"]),
    (OPERATORS[2:], {"rounding_seed": 3}, ["rounding_seed", "float32"]),
    (OPERATORS[:1], {"bias": torch.ones(8)}, ["bias", "6", "(8)"]),
    (OPERATORS[:1], {"weight": None}, ["bias", "without a weight"]),
    (OPERATORS[1:2], {"weight": None, "merge": True}, ["merge", "weight", "None"]),
    (OPERATORS[1:2], {"dy": torch.ones(4, 5)}, ["dy", "(4, 5)"]),
    (OPERATORS[1:2], {"dy": torch.ones(3, 6)}, ["dy", "(3, 6)", "(4, 8)"]),
    (OPERATORS[1:2], {"dy": torch.ones(4, 6).double()}, ["dy", "float64"]),
]


@pytest.mark.parametrize("names, change, expected", WRONG, ids=[str(w[2]) for w in WRONG])
def test_one_wrong_argument(names, change, expected):
    layer = make_layer(8, 6, 3, "hadamard", 4, torch.float32)
    before = layer.cast(torch.float32)
    before = {k: v.clone() for k, v in vars(before).items() if isinstance(v, torch.Tensor)}
    for name in names:
        op, inputs = call(name, layer, **change)
        with pytest.raises(RuntimeError) as raised:
            op(*inputs)
        message = str(raised.value).splitlines()[0]
        assert all(text in message for text in expected), (name, message)
    assert all(torch.equal(getattr(layer, k), v) for k, v in before.items())


@PATHS
@pytest.mark.parametrize("shape", [(50, 37, 7), (37, 50, 7)], ids=str)
def test_a_raw_operator_is_what_linear_calls(shape, path):
    layer = make_layer(*shape, "hadamard", 20, torch.float32)
    for part in ("all", "x", "diagonals"):
        op, inputs = call(
            "hadamard_linear_backward", layer, merge=path == "merged",
            need_x=part != "diagonals", need_diagonals=part != "x",
        )  # fmt: skip
        expected = ours(layer, path)
        for name, result in zip(NAMES[1:], op(*inputs), strict=True):
            asked = part == "all" or (part == "x") == (name == "dx")
            assert torch.equal(result, expected[name]) if asked else result.numel() == 0, name
    op, inputs = call("hadamard_linear", layer, merge=path == "merged")
    assert torch.equal(op(*inputs), ours(layer, path)["y"])


# ---- every way in which torch calls


@PATHS
def test_checkpointing(path):
    layer = make_layer(37, 50, 7, "hadamard", 20, torch.float32)
    expected = ours(layer, path)
    arguments = layer.weight, layer.bias, layer.basis

    def function(x, lam, gam):
        return linear(x, *arguments, lam, gam, layer.scaling, path)

    for reentrant in (False, True):
        leaves = [t.detach().clone().requires_grad_() for t in (layer.x, layer.lam, layer.gam)]
        y = checkpoint(function, *leaves, use_reentrant=reentrant)
        y.backward(layer.dy)
        assert torch.equal(y, expected["y"])
        assert all(torch.equal(t.grad, expected[n]) for n, t in zip(NAMES[1:], leaves, strict=True))


@PATHS
def test_inference_mode(path):
    layer = make_layer(37, 50, 7, "hadamard", 20, torch.float32)
    layer.basis = make_basis(37, 50, 7, "hadamard", seed=97)  # of no other test
    arguments = layer.weight, layer.bias, layer.basis, layer.lam, layer.gam, layer.scaling, path
    with torch.inference_mode():
        y = linear(layer.x, *arguments)
        merged_weight(*(arguments[k] for k in (2, 0, 3, 4)))
    assert y.is_inference() and not any(t.is_inference() for t in layer.basis.packed())
    results = ours(layer, path)  # what was packed there serves training
    assert torch.equal(results["y"], y) and results["dlam"].any()


# ---- devices without kernels


def test_plain_torch_is_registered_for_every_other_device():
    for name in OPERATORS:
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        assert has(f"randlora::{name}", "CompositeExplicitAutograd")
        assert has(f"randlora::{name}", "CPU")
        for key in ("XPU", "MPS", "PrivateUse1"):
            assert not has(f"randlora::{name}", key)  # so that the composite one is taken
            table = torch._C._dispatch_dump_table(f"randlora::{name}")
            (line,) = [line for line in table.splitlines() if line.startswith(f"{key}:")]
            assert "default backend kernel" in line, line


def test_the_dispatcher_reaches_plain_torch(monkeypatch):
    # Without the CPU's own kernels the call goes where that of any other device goes.
    layer = make_layer(37, 50, 7, "hadamard", 20, torch.float32)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    op, inputs = call("hadamard_linear", layer)
    plain_y = module._plain_linear(*inputs)
    assert torch.equal(op.redispatch(keys, *inputs), ours(layer, "factored")["y"])
    assert rms_error(plain_y, exact(layer)["y"]) < 1e-6


@pytest.mark.parametrize("shape", [(37, 50, 7), (50, 37, 7)], ids=str)
@PATHS
def test_meta_tensors_have_shapes_and_gradients(shape, path):
    layer = make_layer(*shape, "hadamard", 4, torch.bfloat16, lead=(3,))
    tensors = ("x", "weight", "bias", "lam", "gam", "dy")
    meta = replace(layer, **{k: getattr(layer, k).to("meta") for k in tensors})
    results = ours(meta, path)
    for name, wanted in exact(layer).items():
        assert results[name].is_meta and results[name].shape == wanted.shape
    merged = merged_weight(meta.basis, meta.weight, meta.lam, meta.gam)
    assert merged.is_meta and merged.shape == layer.weight.shape
    assert delta_weight(meta.basis, meta.lam, meta.gam).shape == layer.weight.shape


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"x": torch.ones(4, 7)}, "x must be"),
        ({"x": torch.ones(4, 8).int()}, "x must be a floating"),
        ({"lam": torch.ones(6)}, "lam must be"),
        ({"lam": torch.ones(3, 2).int()}, "lam must be a floating"),
        ({"gam": torch.ones(2, 1)}, "gam must be"),
        ({"gam": torch.ones(2, 6).int()}, "gam must be a floating"),
        ({"col": torch.ones(7).char()}, "col must be"),
        ({"weight": torch.ones(1, 8)}, "weight must be"),
        ({"weight": torch.ones(6, 8).double()}, "weight must be torch.float32"),
        ({"bias": torch.ones(1)}, "bias must be"),
        ({"weight": None}, "bias was given without a weight"),
        ({"first_row": -1}, "first_row must not be negative"),
        ({"first_column": 1}, r"first_column in \[0, 0\]"),
    ],
)
def test_plain_torch_refuses(change, expected):
    layer = make_layer(8, 6, 3, "hadamard", 4, torch.float32)
    _, inputs = call("hadamard_linear", layer, **change)
    with pytest.raises(RuntimeError, match=f"randlora: .*{expected}"):
        module._plain_linear(*inputs)


def test_plain_torch_refuses_what_our_kernels_refuse():
    layer = make_layer(9, 5, 2, "hadamard", 3)
    bases = constants(layer)
    rest = layer.lam, layer.gam, *bases
    for call in (
        lambda: module._plain_weight(layer.weight[:1], *rest, None),
        lambda: module._plain_linear(layer.x, None, None, *rest, True),
        lambda: module._plain_linear_backward(
            layer.dy[:1], layer.x, layer.weight, *rest, False, True, True
        ),
    ):
        with pytest.raises(RuntimeError, match="randlora: (weight|merge|dy)"):
            call()


def test_the_weight_has_a_gradient():
    layer = make_layer(9, 5, 2, "hadamard", 3)
    W = layer.weight.clone().requires_grad_()
    ops.hadamard_weight(W, layer.lam, layer.gam, *constants(layer), None).sum().backward()
    assert torch.equal(W.grad, torch.ones_like(W))


def test_plain_torch_has_no_random_rounding():
    layer = make_layer(8, 6, 3, "hadamard", 4, torch.bfloat16)
    _, inputs = call("hadamard_weight", layer, rounding_seed=3)
    with pytest.raises(RuntimeError, match="rounding_seed needs our kernels"):
        module._plain_weight(*inputs)
