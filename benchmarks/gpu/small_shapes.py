"""Every operator once on shapes with ragged ends: the program that compute-sanitizer watches.

Results are only checked to be finite; tests/gpu compares them. With --plant it hands lists_to_dense
an index beyond its row, which memcheck must report; otherwise it watched nothing.
"""

import argparse

import torch

from randlora_ext import _C, TernaryBasis
from randlora_ext.ops import hadamard
from randlora_ext.ops.independent import operands

ops = torch.ops.randlora
DTYPES = [torch.bfloat16, torch.float32, torch.float16, torch.float64]
SHAPES = [(70, 45, 7), (45, 70, 7), (136, 136, 8)]  # in, out, r
HADAMARD = [(70, 45, 7), (45, 70, 10), (272, 136, 8), (61, 61, 70), (1, 5, 3)]  # in, out, r
TOKENS = [1, 19, 70]
DRY_TOKENS = [1, 19]


def finite(*results: torch.Tensor) -> int:
    for result in results:
        if not result.isfinite().all():
            raise SystemExit("a result is not finite")
    return 1


def bases(basis: TernaryBasis, device: torch.device) -> int:
    """Generation and packing; returns how many calls."""
    planes = torch.empty(2, basis.D, -(-basis.K // 64), dtype=torch.int64, device=device)
    ops.fill_planes_(planes, basis.seed, 1, 0, 0, basis.K, _C.threshold(basis.density))
    dense = ops.planes_to_dense(planes, basis.K, 0.5, torch.bfloat16)
    calls = finite(dense)
    for by_column in (False, True):
        for wide in (False, True):
            lists = ops.planes_to_lists(planes, basis.K, by_column, wide)
            cols = basis.D if by_column else basis.K
            calls += 1 + finite(ops.lists_to_dense(*lists, cols, 0.5, torch.float32))
    return calls


def diagonals(basis: TernaryBasis, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    compute = torch.promote_types(dtype, torch.float32)
    lam = torch.randn(basis.r, basis.n, device=device)
    # About as large as in a new adapter: float16 cannot hold much larger products.
    gam = torch.randn(basis.n, basis.d, device=device) / basis.d
    return [lam.to(compute), gam.to(compute)]


def operators(
    basis: TernaryBasis, dtype: torch.dtype, device: torch.device, tokens: list[int]
) -> int:
    """scaled_basis and independent_linear, forward and backward; returns how many calls."""
    lam, gam = diagonals(basis, dtype, device)
    bases = operands(basis, device)
    out, into = basis.out_features, basis.in_features
    A = basis.dense_a(device, dtype)
    scaled = ops.scaled_basis(A, lam, gam)
    calls = finite(scaled) + finite(*ops.scaled_basis_backward(scaled, A, lam, gam))
    weight = torch.randn(out, into, device=device).to(dtype)
    for count in tokens:
        x, dy = (torch.randn(count, f, device=device).to(dtype) for f in (into, out))
        last = lam, gam, *bases
        calls += finite(ops.independent_linear(x, weight, None, *last))
        backward = ops.independent_linear_backward
        calls += finite(*backward(dy, x, weight, *last, True, True))
    return calls


def hadamard_operators(
    basis: TernaryBasis, dtype: torch.dtype, device: torch.device, tokens: list[int]
) -> int:
    """hadamard_weight and hadamard_linear, forward and backward; returns how many calls."""
    bases = *diagonals(basis, dtype, device), *hadamard.operands(basis, device)
    weight = torch.randn(basis.out_features, basis.in_features, device=device).to(dtype)
    calls = sum(finite(ops.hadamard_weight(w, *bases)) for w in (weight, None))
    for count in tokens:
        x, dy = (torch.randn(count, n, device=device).to(dtype) for n in weight.shape[::-1])
        for base in (weight, None):
            calls += finite(ops.hadamard_linear(x, base, None, *bases))
            backward = ops.hadamard_linear_backward
            calls += finite(*backward(dy, x, base, *bases, True, True))
    return calls


def plant(device: torch.device) -> None:
    offset = torch.tensor([0, 1, 1], device=device)
    index = torch.tensor([30000], dtype=torch.int16, device=device)
    ops.lists_to_dense(offset, index, 8, 1.0, torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plant", action="store_true")
    parser.add_argument("--dry", action="store_true", help="on the CPU, fewer tokens")
    options = parser.parse_args()
    device = torch.device("cpu" if options.dry else "cuda")
    torch.manual_seed(0)
    if options.plant:
        plant(device)
        torch.cuda.synchronize()
        return
    calls, tokens = 0, DRY_TOKENS if options.dry else TOKENS
    for dtype in DTYPES:  # time may run out: bf16 over all shapes first
        for shape in SHAPES:
            for density in (1 / 3, 0.07):
                basis = TernaryBasis(*shape, density, 1)
                if dtype is DTYPES[0]:
                    calls += bases(basis, device)
                calls += operators(basis, dtype, device, tokens)
            print(f"{calls} calls so far: {dtype}, {shape}", flush=True)
        for shape in HADAMARD:
            basis = TernaryBasis(*shape, seed=1, kind="hadamard")
            calls += hadamard_operators(basis, dtype, device, tokens)
    print(f"{calls} calls of operators, all finite")


if __name__ == "__main__":
    main()
