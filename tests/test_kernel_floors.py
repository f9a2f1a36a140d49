"""benchmarks/gpu/kernel_floors.py: every CUDA kernel has a floor, as its source reckons it.

The kernels are those of tests/cuda/budget.json, which the compile gate keeps, and those that
csrc/cuda defines, where no gate has run yet.
"""

import json
import re
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
if not (ROOT / "benchmarks" / "gpu").is_dir():
    pytest.skip("there are no benchmarks beside these tests", allow_module_level=True)
sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu import delta_floors, factored_floors, floors, report  # noqa: E402
from gpu.card import short_name  # noqa: E402
from gpu.floors import Floor  # noqa: E402
from gpu.kernel_floors import FLOORS, UNKNOWN, beside_floors, floor_of, parse  # noqa: E402
from gpu.work import Work  # noqa: E402

from randlora_ext import TernaryBasis  # noqa: E402

CEILINGS = {"copy_bytes_per_s": 3.35e12, "bf16_flop_per_s": 989e12, "fma_per_s": 28.7e12,
            "integer_per_s": 14.4e12, "multiprocessors": 132}  # fmt: skip
SPARSE, PLANES = (TernaryBasis(4096, 4096, 32, density) for density in (1 / 64, 1 / 3))
REDUCE = TernaryBasis(14336, 4096, 32, 1 / 3)
MB = 1e6


def works():
    """Every kind of call: formats of B, orientations, few tokens and many, both directions."""
    densities = (1 / 64, 0.07, 1 / 3)
    for size, density, tokens, backward in product(
        ((4096, 4096), (14336, 4096)), densities, (16, 8192), (False, True)
    ):
        b = TernaryBasis(*size, 64, density)  # of A as well as of dlambda there are several parts
        B = (b.D, b.K)
        yield Work(b, tokens, backward, (B,), ((B, False), (B, True)))


SOME = next(works())


def test_every_kernel_has_a_floor():
    source = "".join(file.read_text() for file in sorted((ROOT / "csrc" / "cuda").glob("*.[ch]*")))
    found = re.findall(r"__global__ void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(", source)
    assert len(found) == source.count("__global__") > 30
    budget = json.loads((ROOT / "tests" / "cuda" / "budget.json").read_text())["sources"]
    kernels = {kernel for of_source in budget.values() for kernel in of_source}
    kernels |= set(found) - {parse(kernel)[0] for kernel in kernels}
    without = sorted(kernel for kernel in kernels if floor_of(kernel, SOME) is None)
    assert not without, f"add a floor to benchmarks/gpu/*_floors.py for {', '.join(without)}"
    assert {key.partition("/")[0] for key in FLOORS} == set(found), "a floor without a kernel"


@pytest.mark.parametrize("key", FLOORS)
def test_a_floor_is_a_number_of_bytes_wherever_its_kernel_runs(key):
    arguments = {"contract_kernel/2": ("float", "unsigned short"),
                 "b_planes_kernel": ("bf16", "false", "true", "128")}  # fmt: skip
    name = f"{key.partition('/')[0]}<{', '.join(arguments.get(key, ('float',)))}>"
    made = [floor_of(name, work) for work in works()]
    assert all(min(f.bytes, f.matrix, f.fma, f.integer) >= 0 for f in made)
    assert any(f.bytes > 0 for f in made)


def floor(kernel: str, work: Work, launches: float = 1) -> Floor:
    """As `beside_floors` finds it."""
    row = {"kernel": kernel, "us": 1.0, "launches": launches}
    assert "over_floor" in beside_floors([row], work, CEILINGS)[0]
    made = floor_of(kernel, replace(work, launches=launches))
    assert made is not None
    return made


def test_floors_as_the_sources_reckon_them():
    """Figures of the comments in csrc/cuda, for 4096 x 4096, r = 32, T = 8192, bf16."""
    many, dense = Work(SPARSE, 8192), Work(PLANES, 8192)
    up = floor("up_kernel<bf16, 4, 8, false>", many, 4)
    assert up.matrix == pytest.approx(4.3e9, rel=0.01)
    # V is 67 MB; of z the columns that A uses, 39 percent; the values 0.5 MB a launch.
    assert up.bytes == pytest.approx((67.1 + 0.39 * 67.1 + 4 * 0.55) * MB, rel=0.01)
    assert floor("up_kernel<bf16, 4, 8, false>", dense, 4).matrix == pytest.approx(92e9, rel=0.01)
    fill = floor("fill<bf16>", many, 4)
    assert fill.bytes == pytest.approx(134 * MB, rel=0.01)  # 67 read and 67 written
    down = floor("down_kernel<bf16, 1, 2, false>", Work(SPARSE, 8192, True))
    assert down.bytes == pytest.approx(134 * MB, rel=0.01) and down.fma == pytest.approx(17e6, 0.02)
    assert floor("sum_lists<bf16, unsigned short, 16, true>", many).fma == pytest.approx(
        2.1e9, 0.05
    )
    # 4.2 MB of planes and 0.1 MB of tokens; eight blocks share a tile, each with its sums in fp32.
    few = Work(PLANES, 16)
    shared = floor("b_planes_kernel<bf16, false, true, 16>", few)
    assert shared.bytes == pytest.approx((4.19 + 0.13 + 8 * 0.26) * MB, rel=0.01)
    assert floor("add_partial_kernel<bf16>", few).bytes == pytest.approx(8.5 * 0.262 * MB, rel=0.01)
    whole = floor("b_planes_kernel<bf16, false, true, 128>", dense)
    assert whole.bytes == pytest.approx(138 * MB, rel=0.01)
    assert whole.matrix == pytest.approx(275e9, rel=0.01)
    # dW: 34 MB written; value is 1 MB, B's entries as much.
    form = floor("form_kernel<bf16, false>", many)
    assert form.bytes == pytest.approx((33.6 + 1 + 1) * MB, rel=0.02)
    assert form.fma == pytest.approx(16.8e6, rel=0.01)
    turned = floor("transpose_kernel<bf16, unsigned short>", many)
    assert turned.bytes == pytest.approx((33.6 + 13) * MB, rel=0.01)
    # 8.4 MB of parts of dgamma, 0.5 MB of dlambda.
    assert floor("delta_gradients_kernel<float>", dense).fma == pytest.approx(
        8.9 * MB / 4, rel=0.01
    )
    assert floor("row_codes_kernel", dense).bytes == pytest.approx(2 * 4.19 * MB, rel=0.01)
    assert floor("scaled_basis_kernel<bf16, true, float>", dense).fma == pytest.approx(34e6, 0.02)
    assert floor("gemm", many).matrix == 2 * 8192 * 4096**2


def test_generation_and_lists():
    b = TernaryBasis(14336, 4096, 32, 1 / 64)
    A, B = (b.r, b.d), (b.D, b.K)
    w = Work(b, generated=(A, B), listed=((A, False), (B, False), (B, True)))
    planes = floor("fill_planes_kernel", w, 2)
    assert planes.bytes == pytest.approx(14.7 * MB, rel=0.01)
    assert planes.integer == pytest.approx(floors.whole_basis(b).integer * (1 + 32 / 14336))
    assert floor("transpose_planes_kernel", w, 2).bytes == pytest.approx(2 * 29.4 * MB, rel=0.01)
    assert floor("count_lists_kernel", w, 3).bytes == pytest.approx((2 * 14.7 + 0.3) * MB, rel=0.01)
    filled = floor("fill_lists_kernel<unsigned short>", w, 3)
    assert filled.bytes == pytest.approx((2 * (14.7 + 1.84) + 0.3) * MB, rel=0.01)


# The kernels of a call with how often the profiler sees them, on an H100: csrc/cuda/linear.cu ...
A_UP = {"find_entries<unsigned short>": 1, "form_values<bf16, float>": 1, "fill<bf16>": 4,
        "up_kernel<bf16, 4, 8, false>": 4}  # fmt: skip
A_GRAD = {"grad_kernel<bf16, 4, 8, false>": 4, "contract_kernel<float>": 1, "sum_lambda<float>": 1}
A_DOWN = {"find_entries<unsigned short>": 1, "form_values<bf16, float>": 1,
          "down_kernel<bf16, 2, 2, false>": 1}  # fmt: skip
B_UP, B_DOWN = (f"b_planes_kernel<bf16, false, {way}, 128>" for way in ("true", "false"))
GEMM = "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT"


@pytest.mark.parametrize(
    ("basis", "backward", "dense", "kernels"),
    (
        (PLANES, False, False, {**A_UP, B_UP: 1}),
        (PLANES, True, False, {**A_DOWN, "fill<bf16>": 4, B_DOWN: 1, **A_GRAD}),
        (REDUCE, False, True, {**A_DOWN, GEMM: 1}),
        (REDUCE, True, False, {**A_UP, "fill<bf16>": 8, B_UP: 1, B_DOWN: 1, **A_GRAD}),
        (REDUCE, True, True, {**A_UP, "fill<bf16>": 8, GEMM: 2, **A_GRAD}),
    ),
)
def test_the_kernels_of_a_layer_do_its_work(basis, backward, dense, kernels):
    work = Work(basis, 8192, backward)
    made = sum((floor(kernel, work, count) for kernel, count in kernels.items()), Floor(0))
    of_operator = (floors.linear_backward if backward else floors.linear)(basis, 8192, dense)
    assert made.matrix == pytest.approx(of_operator.matrix)
    assert made.bytes > of_operator.bytes  # for what lies between goes through memory


@pytest.mark.parametrize(
    ("basis", "kernels"),
    (
        (SPARSE, ["prepare_kernel<float, unsigned short>", "form_kernel<bf16, false>"]),
        (SPARSE, ["transpose_kernel<bf16, unsigned short>", "gather_kernel<bf16, unsigned short>",
                  "contract_kernel<float, unsigned short>"]),
        (PLANES, ["row_codes_kernel", "signs_kernel<unsigned short>",
                  "delta_planes_kernel<bf16, false, false, false>"]),
        (PLANES, ["column_codes_kernel", "signs_kernel<unsigned short>",
                  "delta_planes_backward_kernel<bf16, false, false>",
                  "delta_gradients_kernel<float>"]),
    ),
)  # fmt: skip
def test_the_kernels_of_dW_do_its_work(basis, kernels):
    made = sum((floor(kernel, Work(basis)) for kernel in kernels), Floor(0))
    of_operator = floors.delta_weight(basis)
    assert made.matrix == of_operator.matrix and made.fma > of_operator.fma
    assert made.bytes > of_operator.bytes


def test_tokens_are_shared_out_and_the_rest_is_read_again():
    work = Work(PLANES, 3 * 8192)  # three chunks of 64 MiB, of four parts each
    assert (work.chunk, work.part, work.chunks, work.parts) == (8192, 2048, 3, 12)
    one = Work(PLANES, 8192)
    grad = "grad_kernel<bf16, 4, 8, false>"
    for kernel, launches in ((B_UP, 1), ("fill<bf16>", 4), (GEMM, 1), (grad, 4)):
        thrice, once = floor(kernel, work, 3 * launches), floor(kernel, one, launches)
        assert thrice.bytes == pytest.approx(3 * once.bytes)
        assert thrice.matrix == pytest.approx(3 * once.matrix)
    assert Work(PLANES, 16).parts == 1 and Work(PLANES, 2100).parts == 2


def test_balanced_bases():
    """Figures of the comments in csrc/cuda/balanced.cu and fill_balanced.cu."""
    made = Work(TernaryBasis(14336, 4096, 32, 1 / 8, support="balanced"))
    assert floor("choose", made).bytes == pytest.approx((1.8 + 0.46) * MB, rel=0.02)
    assert floor("place", made).bytes == pytest.approx((0.46 + 1.03) * MB, rel=0.02)
    used = Work(TernaryBasis(4096, 4096, 32, 1 / 8, support="balanced"), 8192)
    assert floor("find_lines", used).bytes == pytest.approx((0.03 + 0.07 + 0.52) * MB, rel=0.02)
    assert floor("spread_signs<bf16>", used).bytes == pytest.approx((0.3 + 4.2) * MB, rel=0.02)
    assert floor("turn_kernel<bf16>", used).bytes == pytest.approx(134 * MB, rel=0.01)
    # A second launch draws A.
    assert floor("draw_keys", made, 2).bytes == pytest.approx(4 * 32 * (14336 + 4096))


B_MADE = {"find_lines": 1, "spread_signs<bf16>": 1, "turn_kernel<bf16>": 1}
A_MADE = {"find_entries<unsigned short>": 1, "form_values<bf16, float>": 1}
UP, DOWN = "up_kernel<bf16, 4, 8, false>", "down_kernel<bf16, 2, 2, false>"


@pytest.mark.parametrize(
    ("shape", "tokens", "backward", "kernels"),
    (
        ((4096, 4096), 8192, False, {**A_MADE, **B_MADE, "fill<bf16>": 4, UP: 4, DOWN: 1}),
        ((4096, 4096), 8192, True,
         {**A_MADE, **B_MADE, **A_GRAD, "fill<bf16>": 8, UP: 4, DOWN: 1}),
        ((14336, 4096), 8192, False, {**A_MADE, **B_MADE, "fill<bf16>": 16, UP: 16, DOWN: 1}),
        ((14336, 4096), 8192, True,
         {**A_MADE, **B_MADE, **A_GRAD, "fill<bf16>": 24, UP: 20, DOWN: 1}),
    ),
)  # fmt: skip
def test_the_kernels_of_a_balanced_layer_do_its_work(shape, tokens, backward, kernels):
    work = Work(TernaryBasis(*shape, 32, 1 / 8, support="balanced"), tokens, backward)
    made = sum((floor(kernel, work, count) for kernel, count in kernels.items()), Floor(0))
    of_operator = (floors.linear_backward if backward else floors.linear)(work.basis, tokens, False)
    assert made.matrix == pytest.approx(of_operator.matrix)
    assert made.bytes > of_operator.bytes
    few = replace(work, tokens=8)  # A's products are then those of a_few.cu
    of_one = [floor_of(kernel, few) for kernel in (UP, DOWN)]
    assert sum(f.matrix > 0 for f in of_one) == 1 + (backward and shape[0] > shape[1])


def test_names_as_the_profiler_gives_them():
    symbol = (
        "void randlora::cuda::(anonymous namespace)::b_planes_kernel<randlora::bf16, (bool)0,"
        " (bool)1, (int)16>(randlora::cuda::(anonymous namespace)::Product<randlora::bf16>)"
    )
    assert parse(short_name(symbol)) == ("b_planes_kernel", ("bf16", "0", "1", "16"))
    few = Work(PLANES, 16)
    assert floor(short_name(symbol), few) == floor("b_planes_kernel<bf16, false, true, 16>", few)
    plain = "randlora::cuda::(anonymous namespace)::fill_planes_kernel(randlora::FillPlanes, long)"
    assert parse(short_name(plain)) == ("fill_planes_kernel", ())
    # Two kernels of one name.
    work = Work(SPARSE, 8192, True)
    assert floor("contract_kernel<float>", work) == factored_floors.contract(work)
    assert floor("contract_kernel<float, unsigned short>", work) == delta_floors.contract(work)


def test_a_kernel_without_a_floor_is_seen():
    rows = [
        {"kernel": "at::native::copy<float>", "launches": 1.0, "us": 5.0},
        {"kernel": "prepare_kernel<float, unsigned short>", "launches": 1.0, "us": 3.0},
    ]
    unknown, known = beside_floors(rows, Work(SPARSE), CEILINGS)
    assert unknown == rows[0] | {"floor": UNKNOWN}
    assert known["over_floor"] == 3.0 / max(known["byte_us"], known["operation_us"])
    row = {"op": "delta_weight", "size": "s", "density": "1/3", "tokens": None, "us": 9.0}
    results = {"stages": {"kernels": {"rows": [row | {"kernels": [unknown, known]}]}}}
    lines = report.kernels(results).splitlines()
    assert lines[-2].endswith("| `at::native::copy<float>` | 1 | 5 | - | - | no floor known |")
    assert lines[-1].endswith(f"| {known['over_floor']:.3g} |")
