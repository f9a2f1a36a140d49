"""Block bases against the plain PyTorch reference, by our operators and in plain torch."""

import pytest
import torch
from layer_cases import (  # noqa: F401
    SIXTEEN_BITS,
    assert_delta_weight,
    assert_rule,
    exact,
    forward_backward,
    largest_error,
    make_layer,
    one_thread,
    ours,
    plain,
    rms_error,
)

import randlora_ext
from randlora_ext import TernaryBasis, delta_weight, explain, kernels, linear, merged_weight
from randlora_ext.ops import functional
from randlora_ext.ops.costs import choose_b_side
from randlora_ext.reference import delta_weight_reference

# in, out, r, G: wide, tall, square; q = r / G of 1, 2, 4 and 8; G = 3; an overhanging base; r > d;
# K / G a multiple of G and not.
LAYERS = [
    (64, 96, 8, 4),
    (96, 64, 8, 4),
    (48, 48, 16, 2),
    (60, 120, 12, 3),
    (120, 60, 12, 3),
    (36, 72, 6, 3),
    (64, 64, 8, 8),
    (130, 70, 10, 5),
    (16, 32, 32, 4),
    (4, 4, 16, 2),
    (4, 8, 16, 4),
]
PATHS = ["factored", "delta", "merged"]


@pytest.fixture(params=["operators", "plain torch"])
def served(request, monkeypatch):
    """Runs a test with our kernels, and as on a device that has none."""
    if request.param == "plain torch":
        monkeypatch.setattr(functional, "serve", lambda device_type: False)
    return request.param == "operators"


def block_layer(n_in, n_out, r, groups, tokens, dtype=torch.float64):
    return make_layer(n_in, n_out, r, 1 / groups, tokens, dtype, kind="block")


@pytest.mark.parametrize("sizes", LAYERS, ids=str)
def test_float64(sizes, served):
    for tokens in (0, 1, 3, 17, 64):
        whole = block_layer(*sizes, tokens)
        for layer in (whole, whole.without_weight()):
            oracle = exact(layer)
            for path in PATHS if served else ["factored"]:
                if path == "merged" and layer.weight is None:
                    continue
                for name, value in ours(layer, path).items():
                    assert value.shape == oracle[name].shape, (path, name)
                    error = largest_error(value, oracle[name])
                    assert error <= 1e-12, f"{name} by {path} is off by {error:.3g}"


def test_float64_in_chunks_of_tokens():
    layer = block_layer(32, 32, 1024, 32, 8300)  # V (K, T) would take 68 MB
    oracle = exact(layer)
    for name, value in ours(layer, "factored").items():
        assert largest_error(value, oracle[name]) <= 1e-12, name


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS], ids=str)
@pytest.mark.parametrize("sizes", LAYERS, ids=str)
def test_error_rule(sizes, dtype, served):
    for tokens in (1, 33, 200):
        whole = block_layer(*sizes, tokens, dtype)
        for layer in (whole, whole.without_weight()):
            oracle, simple = exact(layer), plain(layer)
            for path in ("factored", "delta") if served else ["factored"]:
                assert_rule(ours(layer, path), simple, oracle, dtype)
        if dtype is torch.float32 and served:
            assert_rule(ours(whole, "merged"), plain(whole), exact(whole), dtype, floor=2)


def test_float16_keeps_small_diagonals(served):
    # lambda * gamma of 1e-7, as early in training, is about float16's smallest number.
    layer = block_layer(256, 256, 16, 4, 40, torch.float16).without_weight()
    layer.lam, layer.gam, layer.scaling = layer.lam * 1e-4, layer.gam / 16, 5e4
    oracle = exact(layer)
    results = ours(layer, "factored")
    assert all(rms_error(results[name], oracle[name]) < 2e-3 for name in results)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *SIXTEEN_BITS], ids=str)
@pytest.mark.parametrize("sizes", LAYERS, ids=str)
def test_delta_weight(sizes, dtype, served):
    assert_delta_weight(block_layer(*sizes, 0, dtype).cast(dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *SIXTEEN_BITS], ids=str)
@pytest.mark.parametrize("sizes", LAYERS, ids=str)
def test_merged_weight_is_rounded_once(sizes, dtype, served):
    layer = block_layer(*sizes, 0, dtype)
    basis, wide = layer.basis, layer.cast(torch.float64)
    A, B = basis.dense(dtype=torch.float64)
    shape = basis.out_features, basis.in_features
    total = wide.weight + delta_weight_reference(A, B, wide.lam, wide.gam, 0.5, *shape)
    merged = merged_weight(basis, layer.weight, layer.lam, layer.gam, 0.5)
    eps = torch.finfo(dtype).eps
    if dtype is torch.float64:
        assert largest_error(merged, total) < 1e-14
        return
    # Half an ulp, and before the rounding the error of a float32 sum; on CUDA, of 16 bits of A'.
    before = 1e-6 if dtype is torch.float32 else 1e-5
    assert ((merged.double() - total).abs() <= (0.5 * eps + before) * total.abs() + before).all()


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_stochastic_rounding_is_right_on_average(dtype):
    layer = block_layer(64, 96, 8, 4, 0, dtype)
    arguments = layer.basis, layer.weight, layer.lam * 1e-2, layer.gam, 0.5
    once = merged_weight(*arguments, rounding_seed=7)
    assert torch.equal(once, merged_weight(*arguments, rounding_seed=7))
    delta = delta_weight(layer.basis, layer.lam.double() * 1e-2, layer.gam.double(), 0.5)
    total = layer.weight.double() + delta
    mean = sum(merged_weight(*arguments, rounding_seed=k).double() for k in range(200)) / 200
    eps = torch.finfo(dtype).eps
    assert ((once.double() - total).abs() <= 1.01 * eps * total.abs() + 1e-6).all()
    # 200 roundings, each off by at most an ulp: 5 standard deviations.
    assert ((mean - total).abs() <= 5 * 0.5 * eps * total.abs() / 200**0.5 + 1e-6).all()


def test_plain_torch_refuses_stochastic_rounding(monkeypatch):
    monkeypatch.setattr(functional, "serve", lambda device_type: False)
    layer = block_layer(64, 96, 8, 4, 0, torch.bfloat16)
    with pytest.raises(ValueError, match="rounding_seed needs our kernels"):
        merged_weight(layer.basis, layer.weight, layer.lam, layer.gam, 1.0, rounding_seed=1)


def test_independent_bases_need_kernels(monkeypatch):
    monkeypatch.setattr(functional, "serve", lambda device_type: False)
    layer = make_layer(64, 96, 8, 0.07, 3)
    with pytest.raises(ValueError, match="x is on cpu, for which no kernels.*only block bases"):
        ours(layer, "auto")


@pytest.mark.parametrize("sizes", [(64, 96, 8, 4), (96, 64, 8, 4), (36, 72, 6, 3)], ids=str)
def test_compiled(sizes, served):
    layer = block_layer(*sizes, 20, torch.float32)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x, lam, gam):
        return linear(x, layer.weight, layer.bias, layer.basis, lam, gam, layer.scaling)

    results, expected = forward_backward(step, layer), ours(layer, "auto")
    for name, value in results.items():
        assert largest_error(value, expected[name]) < 1e-6, name


def test_autocast():
    layer = block_layer(64, 96, 8, 4, 20, torch.float32)
    arguments = layer.weight, layer.bias, layer.basis, layer.lam, layer.gam, layer.scaling
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(layer.x, *arguments)
    cast = [t.bfloat16() for t in (layer.x, layer.weight, layer.bias)]
    assert torch.equal(y, linear(*cast, *arguments[2:]))


def test_thread_counts_and_repeats_give_equal_bits():
    layer = block_layer(64, 96, 8, 4, 200, torch.float32)
    torch.set_num_threads(2)
    first, again = ours(layer, "factored"), ours(layer, "factored")
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((64, 100, 8, 1 / 8), r"densities that fit: 1/2, 1/4$"),
        ((63, 97, 9, 1 / 4), "no density fits"),
        ((24, 24, 12, 1 / 2), r"power of two.*r=12; densities that fit: 1/3"),
        ((32, 32, 32, 1 / 16), "to be 256 or more"),
        ((64, 64, 8, 0.3), "density of block bases must be 1 / G"),
        ((64, 64, 8, 5e-324), "density of block bases must be 1 / G"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        TernaryBasis(*sizes, kind="block")


def test_packed_tensors_of_another_layer_are_refused():
    layer = block_layer(64, 96, 8, 4, 3, torch.float32)
    other = TernaryBasis(64, 192, 8, 1 / 4, kind="block")
    a, planes = layer.basis.packed()
    dense = layer.basis.dense_b("cpu", torch.float32)
    call = torch.ops.randlora.linear
    arguments = layer.x, layer.weight, layer.bias, layer.lam, layer.gam
    for packed, message in [
        ([a, other.packed()[1].clone()[:, :, :1].contiguous()[:, :32]], "b_planes must be"),
        ([a.int(), planes], "a must be a contiguous int8"),
        ([a[:, :15], planes], "a must be a contiguous int8"),
        ([a[:0], planes], "a must not be empty"),
        ([a], "packed must hold 2 tensors"),
        ([a, planes, dense[:, :-1]], "dense B must be"),
        ([a, planes, dense.double()], "must have one dtype"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call(*arguments, packed, 1.0, 96, "factored")
    with pytest.raises(RuntimeError, match="of a slice, for which expand is given, 3"):
        call(*arguments, [a, planes], 1.0, 96, "factored", True)
    for place in (torch.empty(4, 4, 0, 0), torch.empty(0, 4, 4, 1, 0), torch.empty(0, 4, 0, 0, 0)):
        with pytest.raises(RuntimeError, match="place must"):
            call(*arguments, [a, planes, place], 1.0, 96, "factored", True)


def test_a_group_of_no_power_of_two_is_refused():
    # Hadamard's transform would leave the rows of its group.
    a, planes = torch.ones(6, 6, dtype=torch.int8), torch.zeros(1, 12, 1, dtype=torch.int64)
    lam, gam = torch.ones(6, 2), torch.ones(2, 12)
    with pytest.raises(RuntimeError, match="r / G must be a power of two.*r / G = 3"):
        torch.ops.randlora.delta_weight(lam, gam, [a, planes], 1.0, 12, 12)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a | {"lam": a["lam"].T}, "lam must be"),
        (lambda a: a | {"gam": a["gam"].T}, "gam must be"),
        (lambda a: a | {"weight": a["weight"][:1]}, "weight must be"),
        (lambda a: a | {"weight": a["weight"].double()}, "weight must be"),
        (lambda a: a | {"bias": a["bias"][:1]}, "bias must be"),
        (lambda a: a | {"weight": None}, "bias was given without a weight"),
        (lambda a: a | {"path": "delta"}, "path must be"),
        (lambda a: a | {"path": "bogus"}, "path must be"),
    ],
)
def test_plain_torch_refuses_what_the_operators_refuse(change, message, monkeypatch):
    layer = block_layer(64, 128, 4, 2, 5, torch.float32)  # lambda (4, 16) is not square
    arguments = {name: getattr(layer, name) for name in ("x", "weight", "bias", "basis")}
    arguments |= {"lam": layer.lam, "gam": layer.gam}
    monkeypatch.setattr(functional, "serve", lambda device_type: False)
    with pytest.raises(ValueError, match=message):
        linear(**change(arguments))


def test_float16_of_large_values_in_plain_torch(monkeypatch):
    layer = block_layer(1024, 1024, 32, 8, 8, torch.float16).without_weight()
    layer.lam, layer.gam = layer.lam * 2, torch.full_like(layer.gam, 1 / 1024)
    layer.dy = layer.dy * 30
    oracle = exact(layer)
    monkeypatch.setattr(functional, "serve", lambda device_type: False)
    results = ours(layer, "auto")
    assert all(rms_error(results[name], oracle[name]) < 3e-3 for name in results)


def test_delta_weight_in_plain_torch_under_autocast(monkeypatch):
    layer = block_layer(64, 96, 8, 4, 0, torch.float32)
    expected = delta_weight(layer.basis, layer.lam, layer.gam)
    monkeypatch.setattr(functional, "serve", lambda device_type: False)
    with torch.autocast("cpu", torch.bfloat16):
        delta = delta_weight(layer.basis, layer.lam, layer.gam)
    assert rms_error(delta, expected) < 1e-6


def test_vmap(served):
    layer = block_layer(64, 96, 8, 4, 5, torch.float32)
    xs = torch.randn(3, 5, 64)
    arguments = layer.weight, layer.bias, layer.basis, layer.lam, layer.gam, layer.scaling
    one_by_one = torch.stack([linear(x, *arguments) for x in xs])
    torch.testing.assert_close(torch.func.vmap(lambda x: linear(x, *arguments))(xs), one_by_one)


def test_the_choice_of_a_path():
    basis = TernaryBasis(2048, 2048, 32, 1 / 8, kind="block")
    assert explain(basis, 16).path == "factored"
    assert explain(basis, 8192).path == "merged"
    assert explain(basis, 8192, torch.bfloat16).path == "factored"
    assert explain(basis, 8192, has_weight=False).path == "factored"
    # A rank's share of the work beside its share of the frozen layer; 16 bits have no classes.
    whole, *parts = (
        explain(b, 8192, torch.bfloat16).costs
        for b in (basis, basis.slice(range(512)), basis.slice(outputs=range(512)))
    )
    assert all(part == pytest.approx(whole) for part in parts)


def test_cuda_takes_packed_blocks_for_a_few_tokens(monkeypatch):
    basis = TernaryBasis(256, 256, 32, 1 / 8, kind="block")
    monkeypatch.delenv("RANDLORA_B_SIDE", raising=False)
    monkeypatch.setattr(kernels, "cuda_serves", lambda device_type: device_type == "cuda")
    sides = [choose_b_side(basis, tokens, "cuda") for tokens in (1, 16, 17, 8192)]
    assert sides == ["packed", "packed", "dense", "dense"]
    assert choose_b_side(basis, 1, "cpu") == choose_b_side(basis, 1, "mps") == "dense"


def test_layers_of_a_shape_share_their_blocks():
    one, two = (TernaryBasis(64, 96, 8, 1 / 4, 5, "block") for _ in range(2))
    turned = one.transposed()
    assert all(a is b for a, b in zip(one.packed(), two.packed(), strict=True))
    assert all(a is b for a, b in zip(one.packed(), turned.packed(), strict=True))
    assert one.dense_b("cpu", torch.float32) is two.dense_b("cpu", torch.float32)
    assert randlora_ext.TernaryBasis(64, 96, 8, 1 / 4, 6, "block") != one


def test_scaled_basis_is_that_of_the_dense_a(served):
    layer = block_layer(64, 96, 8, 4, 0)
    A, _ = layer.basis.dense(dtype=torch.float64)
    expected = (layer.lam[:, :, None] * A[:, None] * layer.gam[None]).flatten(0, 1)
    torch.testing.assert_close(
        functional.scaled_basis(layer.basis, layer.lam, layer.gam), expected, rtol=1e-14, atol=0
    )
