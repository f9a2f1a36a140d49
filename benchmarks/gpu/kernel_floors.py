"""Every kernel of a call beside its own floor.

Unlike an operator's floor (floors.py), a kernel's counts what the kernel itself reads and writes in
global memory, V, U, P, compact values and partial sums included: what fusing kernels would save
shows only in the operator's. Kernels are timed with warm caches, so one whose operands fit in the
L2 may take less than its byte floor.
"""

import re
from collections.abc import Callable
from dataclasses import replace

from . import balanced_floors, delta_floors, factored_floors, packing_floors
from .floors import Floor
from .work import Work

# By name. Two kernels are called contract_kernel; how many arguments a template has tells them
# apart. tests/test_kernel_floors.py fails where a kernel of csrc/cuda is missing.
FLOORS: dict[str, Callable[[Work], Floor]] = {
    **factored_floors.FLOORS,
    **delta_floors.FLOORS,
    **packing_floors.FLOORS,
    **balanced_floors.FLOORS,
}
UNKNOWN = "no floor known"
_LIBRARY_GEMM = re.compile(r"gemm|nvjet|cutlass", re.IGNORECASE)  # of cuBLAS, across its versions


def parse(kernel: str) -> tuple[str, tuple[str, ...]]:
    """`up_kernel<bf16, 4, 8, false>`: its name and the arguments of its template."""
    found = re.fullmatch(r"(\w+)(?:<(.*)>)?", kernel)
    if found is None:
        return kernel, ()
    return found[1], tuple(found[2].split(", ")) if found[2] else ()


def floor_of(kernel: str, work: Work) -> Floor | None:
    """Of all launches of a kernel, by the name that card.py gives it; None where none is known."""
    name, arguments = parse(kernel)
    known = FLOORS.get(name) or FLOORS.get(f"{name}/{len(arguments)}")
    if work.basis.support == "balanced":
        known = balanced_floors.SHARED.get(name, known)
    if known is None and work.tokens and _LIBRARY_GEMM.search(kernel):
        known = factored_floors.gemm
    return known(replace(work, arguments=arguments)) if known else None


def beside_floors(rows: list[dict], work: Work, ceilings: dict) -> list[dict]:
    """The rows of `Card.kernels` with byte_us, operation_us and over_floor, or with "floor":
    UNKNOWN."""
    work = replace(work, multiprocessors=ceilings["multiprocessors"])
    return [row | _times(row, work, ceilings) for row in rows]


def _times(row: dict, work: Work, ceilings: dict) -> dict:
    floor = floor_of(row["kernel"], replace(work, launches=row["launches"]))
    if floor is None or floor.bytes == 0:  # nothing to do: then it is not what ran
        return {"floor": UNKNOWN}
    byte_us, operation_us = floor.byte_us(ceilings), floor.operation_us(ceilings)
    return {"byte_us": byte_us, "operation_us": operation_us,
            "over_floor": row["us"] / max(byte_us, operation_us)}  # fmt: skip
