"""Every CPU operator alone: its time, bytes and operations per second, and share of the roofline.

    python benchmarks/micro.py                     about two minutes; --out FILE for CSV and JSON

Timed by torch.utils.benchmark (medians of blocks, operands warm). An operator's share is the time
that its bytes or its operations take at this machine's peaks, whichever is longer, over the time
that it took; 100% is an operator that nothing could make faster without doing other work.

*Peaks* are measured in the same run. Operations: multiply-adds per second of torch's fastest
float32 matrix product. Bytes: STREAM's triad a = b + 3 c over working sets from 1 MiB up, since
caches are faster than memory; an operator is held to the fastest triad among those that are at
least as large as its own bytes.

*Bytes*: every operand read once and every result written once (gpu/floors.py); what lies between
(V, U, partial sums) is not counted, nor the second reading of an input that forward or backward
needs. A result is a new tensor at every call, as in training: where it is large, the first
touch of its pages is part of the time.

*Operations* are those of our algorithm, not those of the dense product that it replaces: one
multiply-add, one addition or one integer instruction on a vector's lane each counts as one, since
they share the processor's vector units. On Hadamard bases a product with A has K n T multiply-adds
and one with B log2 N additions for each of N T numbers. On independent ones, per product: the A
side density K d T, the B side from lists density D K T (a signed add for each non-zero), from bit
planes D K T / 4 (b_planes.h adds a tabled sum for every four elements). For A' one product an
entry, for its gradient two. For fill_planes_ Philox's instructions; for planes_to_lists none.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from each_operator import Op, of_layers, that_make_bases
from methods import basis_of
from record import machine, write
from torch.utils.benchmark import Timer

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIB = 2**20


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


def row(op: Op, peaks: Peaks, least: float) -> dict:
    taken = seconds(op.call, least)
    # They share the processor's vector units.
    operations = op.floor.matrix / 2 + op.floor.fma + op.floor.integer
    of_bytes = op.floor.bytes / peaks.of_bytes(op.floor.bytes) / taken
    of_operations = operations / peaks.operations / taken
    return {
        "op": op.name,
        "tokens": op.tokens,
        "us": taken * 1e6,
        "bytes": op.floor.bytes,
        "operations": operations,
        "gb_per_s": op.floor.bytes / taken / 1e9,
        "gop_per_s": operations / taken / 1e9,
        "byte_share": of_bytes,
        "operation_share": of_operations,
        "roofline": max(of_bytes, of_operations),
        "bound": "bytes" if of_bytes > of_operations else "operations",
    }


def measure(args, peaks: Peaks) -> Iterator[dict]:
    tokens = [int(count) for count in args.tokens.split(",")]
    sizes = [tuple(int(n) for n in size.split("x")) for size in args.sizes.split(",")]
    for (n_in, n_out), density in product(sizes, args.densities.split(",")):
        basis = basis_of(density, (n_in, n_out), args.rank)
        cases = {"": that_make_bases(basis, CPU)}
        cases |= {name: of_layers(basis, CPU, dtype, tokens) for name, dtype in DTYPES.items()}
        for name, every in cases.items():
            about = {"in": n_in, "out": n_out, "density": density, "dtype": name}
            for op in every:
                yield about | row(op, peaks, args.least)


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
            f"{result['op']:27} {result['in']:>5}x{result['out']:<5} {result['density']:11} "
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
