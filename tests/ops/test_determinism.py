"""Same bits for any number of threads, from run to run, for a token whatever its batch, and under
torch.use_deterministic_algorithms(True), which nothing of ours refuses."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from layer_cases import make_layer, ours

from randlora_ext import Basis, delta_weight
from randlora_ext.ops import dense

ops = torch.ops.randlora
FORMATS = pytest.mark.parametrize("density", [1 / 3, 0.07], ids=["planes", "lists"])
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
    """function() gives a list of tensors; runs it with 1 to 4 threads, and in torch's mode."""
    results = []
    runs = *((n, nullcontext) for n in (1, 2, 3, 4)), (2, deterministic_mode)
    for threads, mode in runs:
        torch.set_num_threads(threads)
        with mode():
            results.append(function())
    for other in results[1:]:
        for k, (a, b) in enumerate(zip(results[0], other, strict=True)):
            assert torch.equal(a, b), f"result {k}: {(a != b).sum()} of {a.numel()} differ"


@FORMATS
def test_generation_and_packing(density):
    basis = Basis(301, 203, 17, density)
    dense = basis.dense()[1]

    def run():
        planes = torch.empty(2, 301, -(-basis.K // 64), dtype=torch.int64)
        ops.fill_planes_(planes, 5, 1, 3, 7, basis.K, int(density * 2**31))
        by_row = ops.planes_to_lists(planes, basis.K, False)
        by_column = ops.planes_to_lists(planes, basis.K, True)
        return [
            planes, *by_row, *by_column, *ops.pack_dense(dense), *basis.dense(),
            ops.planes_to_dense(planes, basis.K, 0.5, torch.bfloat16),
        ]  # fmt: skip

    same_for_any_threads(run)


# Of the second shape the gradient of dW is summed by several threads.
@pytest.mark.parametrize("shape", [(157, 93, 9), (300, 520, 16), (420, 130, 6)], ids=str)
@DTYPES
def test_weights_and_the_scaled_basis(shape, dtype):
    layer = make_layer(*shape, "hadamard", 1, dtype)
    A, arguments = layer.basis.dense(dtype=dtype)[0], (layer.lam, layer.gam)

    def run():
        leaves = [t.detach().to(dtype).requires_grad_() for t in arguments]
        # dW of other bases is a product of torch's.
        outs = dense.scaled(A, *leaves), delta_weight(layer.basis, *leaves)
        gradients = torch.autograd.grad(outs, leaves, [t.detach().sin() for t in outs])
        return [*(t.detach() for t in outs), *gradients]

    same_for_any_threads(run)


# Dense bases are torch's products, whose bits depend on the threads.
@SHAPES
@pytest.mark.parametrize("kind", [1 / 3, 0.07, "hadamard"])
def test_linear(shape, kind):
    # Over the shapes and bases each dtype meets each number of tokens.
    first = shape[0] + int(kind == 0.07)
    for k, tokens in enumerate((1, 16, 40, 300)):
        layer = make_layer(*shape, kind, tokens, TYPES[(first + k) % 4])
        layer.weight.zero_()  # torch's own product, which may depend on the threads, gives zero
        for case in (layer, layer.without_weight()):
            same_for_any_threads(lambda case=case: list(ours(case).values()))


@pytest.mark.parametrize(
    "size, tokens, dtype",
    [
        # The fewer the classes, the larger their products, which torch's GEMM would share out by
        # threads.
        *(
            ((*sizes, r), 200, dtype)
            for sizes in ((300, 420), (420, 300))
            for r in (1, 2, 3, 32)
            for dtype in (torch.float32, torch.bfloat16)
        ),
        ((1500, 700, 5), 300, torch.float32),  # in chunks of tokens
        ((1024, 1024, 8), 300, torch.bfloat16),
        ((1024, 1024, 2), 300, torch.float16),
        ((512, 512, 64), 5000, torch.float32),  # gamma's gradient in spans
    ],
    ids=str,
)
def test_linear_on_large_hadamard_bases(size, tokens, dtype):
    layer = make_layer(*size, "hadamard", tokens, dtype).without_weight()
    same_for_any_threads(lambda: list(ours(layer).values()))


@SHAPES
@FORMATS
@DTYPES
def test_a_token_does_not_depend_on_its_batch(shape, density, dtype):
    # Blocks of 4 to 32 tokens, tails, groups of blocks that share decoded planes: never visible.
    # With a zero weight the base output is the bias whatever GEMM made it, so that a difference
    # could only come from how the adapter's part is added.
    layer = make_layer(*shape, density, 300, dtype)
    layer.weight.zero_()
    for case, names in ((layer, ("y",)), (layer.without_weight(), ("y", "dx"))):
        whole = ours(case)
        for first, end in ((0, 1), (0, 5), (0, 16), (0, 33), (0, 150), (171, 300)):
            for threads in (1, 2):
                torch.set_num_threads(threads)
                part = ours(replace(case, x=case.x[first:end], dy=case.dy[first:end]))
                for n in names:
                    assert torch.equal(part[n], whole[n][first:end]), (n, first, end, threads)
