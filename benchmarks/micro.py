"""Every CPU operator alone: its time, bytes and operations per second, and share of the roofline.

    python benchmarks/micro.py                     about two minutes; --out FILE for CSV and JSON

Timed by torch.utils.benchmark (medians of blocks, operands warm). An operator's share is the time
that its bytes or its operations take at this machine's peaks, whichever is longer, over the time
that it took; 100% is an operator that nothing could make faster without doing other work.

*Peaks* are measured in the same run. Operations: multiply-adds per second of torch's fastest
float32 matrix product. Bytes: STREAM's triad a = b + 3 c over working sets from 1 MiB up, since
caches are faster than memory; an operator is held to the fastest triad among those that are at
least as large as its own bytes.

*Bytes*: every operand read once and every result written once (benchmarks/gpu/floors.py); what lies
between (V, U, partial sums) is not counted, nor the second reading of an input that forward or
backward needs. A result is a new tensor at every call, as in training: where it is large, the first
touch of its pages is part of the time.

*Operations* are those of our algorithm, not those of the dense product that it replaces: one
multiply-add, one addition or one integer instruction on a vector's lane each counts as one, since
they share the processor's vector units. On Hadamard bases a product with A has K n T multiply-adds
and one with B log2 N additions for each of N T numbers. On independent ones, per product: the A
side density K d T, the B side from lists density D K T (a signed add for each non-zero), from bit
planes D K T / 4 (b_planes.h adds a tabled sum for every four elements). For A' and its gradient two
products an entry. For fill_planes_ Philox's
instructions; for planes_to_lists none.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu import floors
from methods import basis_of
from record import machine, write
from torch.utils.benchmark import Timer

from randlora_ext import _C, TernaryBasis
from randlora_ext.ops import hadamard, independent

ops = torch.ops.randlora
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIB = 2**20


@dataclass(frozen=True)
class Op:
    name: str
    call: Callable[[], object]
    bytes: float
    operations: float
    tokens: int | None = None


@dataclass(frozen=True)
class Peaks:
    operations: float  # a second
    bytes: dict[int, float]  # a second, by the bytes of the working set

    def of_bytes(self, count: float) -> float:
        fitting = [rate for size, rate in self.bytes.items() if size >= count]
        return max(fitting, default=self.bytes[max(self.bytes)])


def seconds(call: Callable[[], object], least: float) -> float:
    """Median of a call on all of torch's threads, over at least `least` seconds."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=least).median


def measure_peaks(least: float, gemm: list[int], mib: list[int]) -> Peaks:
    """Peaks here: a product of each size `gemm`, triads over working sets of `mib` MiB."""
    operations = 0.0
    for n in gemm:
        a, b, out = (torch.randn(n, n) for _ in range(3))
        taken = seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), least)
        operations = max(operations, n**3 / taken)
    rates = {}
    for size in mib:
        a, b, c = (torch.randn(size * MIB // 12) for _ in range(3))
        taken = seconds(lambda a=a, b=b, c=c: torch.add(b, c, alpha=3.0, out=a), least)
        rates[size * MIB] = 3 * a.nbytes / taken
    return Peaks(operations, rates)


def of_bases(b: TernaryBasis) -> Iterator[Op]:
    """Generation and packing of B: integers, whatever the dtype of the layer."""
    planes = torch.empty(2, b.D, -(-b.K // 64), dtype=torch.int64)
    fill = (planes, b.seed, 1, 0, 0, b.K, _C.threshold(b.density))
    floor = floors.fill_planes(b)
    yield Op("fill_planes_", lambda: ops.fill_planes_(*fill), floor.bytes, floor.integer)
    if b.format == "lists":
        wide = max(b.D, b.K) > 65536
        for by_column in (False, True):
            yield Op(f"planes_to_lists, {'columns' if by_column else 'rows'}",
                     lambda by_column=by_column: ops.planes_to_lists(planes, b.K, by_column, wide),
                     floors.planes_to_lists(b, by_column).bytes, 0.0)  # fmt: skip


def of_weights(b: TernaryBasis, dtype: torch.dtype) -> Iterator[Op]:
    """A' and its gradient."""
    A = b.dense_a(torch.device("cpu"), dtype)
    lam, gam = (torch.randn(s, dtype=dtype) for s in ((b.r, b.n), (b.n, b.d)))
    grad = torch.randn(b.K, b.d, dtype=dtype)
    moved, entries = floors.scaled_basis(b, dtype.itemsize).bytes, b.K * b.d
    yield Op("scaled_basis", lambda: ops.scaled_basis(A, lam, gam), moved, entries)
    yield Op("scaled_basis backward",
             lambda: ops.scaled_basis_backward(grad, A, lam, gam), moved, 2 * entries)  # fmt: skip


def of_layers(b: TernaryBasis, dtype: torch.dtype, tokens: int) -> Iterator[Op]:
    """The adapter without the base layer's GEMM, which is torch's."""
    x, dy = (torch.randn(tokens, n, dtype=dtype) for n in (b.in_features, b.out_features))
    lam, gam = torch.randn(b.r, b.n), torch.randn(b.n, b.d)
    last = (lam, gam, *independent.operands(b, "cpu"))
    a_side = b.density * b.K * b.d * tokens
    b_side = (0.25 if b.format == "planes" else b.density) * b.D * b.K * tokens
    yield Op("independent_linear", lambda: ops.independent_linear(x, None, None, *last),
             floors.linear(b, tokens, False, dtype.itemsize).bytes,
             a_side + b_side, tokens)  # fmt: skip
    # With d == out the V that dlam needs takes the B side once more.
    b_products = 1 if b.d == b.in_features else 2
    yield Op("independent_linear backward",
             lambda: ops.independent_linear_backward(dy, x, None, *last, True, True),
             floors.linear_backward(b, tokens, False, dtype.itemsize).bytes,
             2 * a_side + b_products * b_side, tokens)  # fmt: skip


def of_hadamard(b: TernaryBasis, dtype: torch.dtype, tokens: list[int]) -> Iterator[Op]:
    """W + dW, and the adapter without the base layer's GEMM."""
    element, small = dtype.itemsize, 4 * (b.r * b.n + b.n * b.d)
    lam, gam = torch.randn(b.r, b.n), torch.randn(b.n, b.d)
    bases = (lam, gam, *hadamard.operands(b, "cpu"))
    W = torch.randn(b.out_features, b.in_features, dtype=dtype)
    floor = floors.hadamard_weight(b, element)
    yield Op("hadamard_weight", lambda: ops.hadamard_weight(W, *bases), floor.bytes, floor.fma)
    for count in tokens:
        x, dy = (torch.randn(count, n, dtype=dtype) for n in W.shape[::-1])
        forward, backward = floors.hadamard(b, count, element)
        yield Op("hadamard_linear",
                 lambda x=x: ops.hadamard_linear(x, None, None, *bases),
                 element * (x.numel() + dy.numel()) + small,
                 forward.matrix / 2 + forward.fma, count)  # fmt: skip
        yield Op("hadamard_linear backward",
                 lambda x=x, dy=dy: ops.hadamard_linear_backward(
                     dy, x, None, *bases, True, True),
                 element * (2 * x.numel() + dy.numel()) + 2 * small,
                 backward.matrix / 2 + backward.fma, count)  # fmt: skip


def making(size: tuple[int, int], r: int) -> Op:
    """Hadamard bases from their seed, another at every call."""
    seeds = itertools.count(1)
    b = TernaryBasis(*size, r, kind="hadamard")
    signs = b.d + b.D + b.K
    return Op("hadamard basis from a seed",
              lambda: TernaryBasis(*size, r, None, next(seeds), "hadamard").packed("cpu"),
              signs, floors.INTEGERS_PER_ELEMENT * signs)  # fmt: skip


def row(op: Op, peaks: Peaks, least: float) -> dict:
    taken = seconds(op.call, least)
    of_bytes = op.bytes / peaks.of_bytes(op.bytes) / taken
    of_operations = op.operations / peaks.operations / taken
    return {
        "op": op.name,
        "tokens": op.tokens,
        "us": taken * 1e6,
        "bytes": op.bytes,
        "operations": op.operations,
        "gb_per_s": op.bytes / taken / 1e9,
        "gop_per_s": op.operations / taken / 1e9,
        "byte_share": of_bytes,
        "operation_share": of_operations,
        "roofline": max(of_bytes, of_operations),
        "bound": "bytes" if of_bytes > of_operations else "operations",
    }


def measure(args, peaks: Peaks) -> Iterator[dict]:
    for size in (tuple(int(n) for n in s.split("x")) for s in args.sizes.split(",")):
        for density in args.densities.split(","):
            basis = basis_of(density, size, args.rank)
            about = {"in": size[0], "out": size[1], "density": density}
            hadamard = basis.kind == "hadamard"
            for op in [making(size, args.rank)] if hadamard else of_bases(basis):
                yield {**about, "dtype": "", **row(op, peaks, args.least)}
            tokens = [int(count) for count in args.tokens.split(",")]
            for name, dtype in DTYPES.items():
                if hadamard:
                    cases = [*of_hadamard(basis, dtype, tokens)]
                else:
                    cases = [*of_weights(basis, dtype)]
                    for count in tokens:
                        cases += of_layers(basis, dtype, count)
                for op in cases:
                    yield {**about, "dtype": name, **row(op, peaks, args.least)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="1024x1024,4096x4096", help="in x out, comma separated")
    parser.add_argument("--tokens", default="16,1024")
    parser.add_argument("--densities", default="hadamard,1/3,0.07,very_sparse")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--least", type=float, default=0.3, help="seconds for each operator")
    parser.add_argument("--gemm", default="1024,2048,4096", help="products for the peak")
    parser.add_argument("--triads", default="1,4,16,64,256", help="working sets in MiB")
    parser.add_argument("--out", type=Path, help="write FILE.json")
    args = parser.parse_args(arguments)

    print(json.dumps(machine()))
    gemm, mib = ([int(n) for n in s.split(",")] for s in (args.gemm, args.triads))
    peaks = measure_peaks(args.least, gemm, mib)
    triads = ", ".join(f"{v / 1e9:.0f} over {k // MIB} MiB" for k, v in peaks.bytes.items())
    print(f"peaks: {peaks.operations / 1e9:.0f} G operations/s; GB/s of triads: {triads}")
    rows = []
    for result in measure(args, peaks):
        print(
            f"{result['op']:25} {result['in']:>5}x{result['out']:<5} {result['density']:11} "
            f"{result['dtype']:5} {result['tokens'] or '':>5} {result['us']:>10.1f} us "
            f"{result['gb_per_s']:>7.1f} GB/s {result['gop_per_s']:>7.1f} Gop/s "
            f"{result['roofline']:>5.0%} of {result['bound']}",
            flush=True,
        )
        rows.append(result)
    if args.out:
        write(args.out, rows, peaks={"operations": peaks.operations, "bytes": peaks.bytes})


if __name__ == "__main__":
    main()
