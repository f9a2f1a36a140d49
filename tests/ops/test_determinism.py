"""Same bits for any number of threads, from run to run, for a token whatever its batch, and under
torch.use_deterministic_algorithms(True), which nothing of ours refuses."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from layer_cases import PAIRS, PATHS, make_layer, ours
from torch.nn import functional as F

from randlora_ext import TernaryBasis, delta_weight, merged_weight, scaled_basis

ops = torch.ops.randlora
FORMATS = pytest.mark.parametrize("density", [1 / 3, 0.07], ids=["planes", "lists"])
# Dense bases are torch's products, whose bits depend on the threads.
CALLS_OF_KERNELS = pytest.mark.parametrize("basis, path", [c for c in PAIRS if c[0] != "dense"])
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DTYPES = pytest.mark.parametrize("dtype", TYPES, ids=str)
# Neither a multiple of a vector (4, 8, 16) nor of a tile of lines (64); several slots everywhere.
SHAPES = pytest.mark.parametrize("shape", [(157, 93, 9), (93, 157, 9), (108, 88, 6)], ids=str)


@contextmanager
def deterministic_mode():
    """With its habit of filling new memory with NaN, so that none is read unwritten."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def same_for_any_threads(function):
    """function() gives a list of tensors; runs it with 1, 2 and 3 threads, and in torch's mode."""
    results = []
    runs = (1, nullcontext), (2, nullcontext), (2, deterministic_mode), (3, nullcontext)
    for threads, mode in runs:
        torch.set_num_threads(threads)
        with mode():
            results.append(function())
    for other in results[1:]:
        for k, (a, b) in enumerate(zip(results[0], other, strict=True)):
            assert torch.equal(a, b), f"result {k}: {(a != b).sum()} of {a.numel()} differ"


@FORMATS
@pytest.mark.parametrize("wide", [False, True])
def test_generation_and_packing(density, wide):
    basis = TernaryBasis(301, 203, 17, density)
    dense = basis.dense()[1]

    def run():
        planes = torch.empty(2, 301, -(-basis.K // 64), dtype=torch.int64)
        ops.fill_planes_(planes, 5, 1, 3, 7, basis.K, int(density * 2**31))
        by_row = ops.planes_to_lists(planes, basis.K, False, wide)
        by_column = ops.planes_to_lists(planes, basis.K, True, wide)
        return [
            planes, *by_row, *by_column, *ops.pack_dense(dense), *basis.dense(),
            ops.planes_to_dense(planes, basis.K, 0.5, torch.bfloat16),
            ops.lists_to_dense(*by_row, basis.K, 0.5, torch.float32),
        ]  # fmt: skip

    same_for_any_threads(run)


def test_dense_bases_in_deterministic_mode():
    layer = make_layer(157, 93, 9, "dense", 70, torch.float32)
    for path in PATHS:
        expected = ours(layer, path)
        with deterministic_mode():
            results = ours(layer, path)
        assert all(torch.equal(results[name], expected[name]) for name in expected)


@SHAPES
@pytest.mark.parametrize("kind", [1 / 3, 0.07, "hadamard"])
@DTYPES
def test_weights_and_the_scaled_basis(shape, kind, dtype):
    layer = make_layer(*shape, kind, 1, dtype)
    grad = torch.randn(layer.weight.shape, dtype=torch.float64).to(dtype)
    A, arguments = layer.basis.dense(dtype=dtype)[0], (layer.lam, layer.gam)
    seeds = [None, 7] if dtype.itemsize == 2 else [None]

    def run():
        leaves = [t.detach().to(dtype).requires_grad_() for t in arguments]
        results = [merged_weight(layer.basis, layer.weight, *arguments, 0.5, s) for s in seeds]
        dW, scaled = delta_weight(layer.basis, *leaves), scaled_basis(A, *leaves)
        results += [dW.detach(), *torch.autograd.grad(dW, leaves, grad)]
        return [*results, scaled.detach(), *torch.autograd.grad(scaled, leaves, scaled.detach())]

    same_for_any_threads(run)


def torch_is_the_same_for_any_threads(layer):
    """False where torch's own product of one token depends on the threads (MKL's gemv)."""
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append((F.linear(layer.x, layer.weight), layer.dy @ layer.weight))
    first = results[0]
    return all(torch.equal(a, b) for r in results for a, b in zip(r, first, strict=True))


@SHAPES
@CALLS_OF_KERNELS
def test_linear(shape, basis, path):
    # Over the shapes, bases and paths each dtype meets each number of tokens.
    first = shape[0] + PATHS.index(path) + int(basis == 0.07)
    for k, tokens in enumerate((1, 16, 40, 300)):
        layer = make_layer(*shape, basis, tokens, TYPES[(first + k) % 4])
        if not torch_is_the_same_for_any_threads(layer):
            assert tokens == 1  # no other products are allowed to differ
            continue
        for case in (layer, layer.without_weight()):
            if case.weight is not None or path != "merged":
                same_for_any_threads(lambda case=case: list(ours(case, path).values()))


@pytest.mark.parametrize(
    "size, tokens, dtype",
    [
        ((1500, 700, 5), 300, torch.float32),
        ((1024, 1024, 8), 300, torch.bfloat16),
        ((512, 512, 64), 5000, torch.float32),  # gamma's gradient in spans
    ],
    ids=str,
)
def test_linear_on_hadamard_bases_in_chunks_of_tokens(size, tokens, dtype):
    layer = make_layer(*size, "hadamard", tokens, dtype).without_weight()
    same_for_any_threads(lambda: list(ours(layer, "factored").values()))


BATCHES = [slice(0, 1), slice(0, 5), slice(0, 16), slice(0, 33), slice(0, 150), slice(171, 300)]


def assert_tokens_are_independent(layer, names):
    whole = ours(layer, "factored")
    for rows in BATCHES:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            part = ours(replace(layer, x=layer.x[rows], dy=layer.dy[rows]), "factored")
            assert all(torch.equal(part[n], whole[n][rows]) for n in names), (rows, threads)


@SHAPES
@FORMATS
@DTYPES
def test_a_token_does_not_depend_on_its_batch(shape, density, dtype):
    # Blocks of 4 to 32 tokens, tails, groups of blocks that share decoded planes: never visible.
    layer = make_layer(*shape, density, 300, dtype)
    assert_tokens_are_independent(layer.without_weight(), ("y", "dx"))
    # With a zero weight the base output is the bias whatever GEMM made it, so that a difference
    # could only come from how the adapter's part is added.
    layer.weight.zero_()
    assert_tokens_are_independent(layer, ("y",))
