"""The cost of our kernels on one kind of device, in multiply-adds of a dense GEMM there.

They are rough: they only have to rank three paths. `python benchmarks/calibrate.py` measures a
machine and prints its `Rates`.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rates:
    """In multiply-adds of a dense GEMM in the same dtype."""

    a_side: float  # a multiply-add of the structured products on gathered rows
    b_lists: float  # a signed add of the B side from lists
    b_planes: float  # an element of the B side from bit planes, zero or not
    # A training step forms dW twice and contracts its gradient once. Per entry of dW it pays adds
    # of compact rows (density^2 * K), their scatter (density * r), terms of a tensor-core product
    # (K), and memory traffic (1).
    form_add: float
    form_scatter: float
    form_term: float
    form_entry: float
    # Block bases: a multiply-add of their products. A step forms dW twice; per entry it pays
    # K / G^2 terms and memory traffic.
    block: float
    block_term: float
    block_entry: float
    round_entry: float  # stochastic rounding of W + dW, which a step forms twice, per entry
    # Dense bases: a multiply-add of their products; an entry of A' or dW, made or contracted.
    dense: float = 1.0
    dense_entry: float = 100.0


# Measured by `python benchmarks/calibrate.py` on 2 cores of an AVX-512 machine (EPYC, Zen 5).
# A GEMM in bfloat16 is four times as fast there; our products compute in float32 all the same.
# The A side took 0.58 there and 1.4 on 2 cores of Zen 4 (benchmarks/results/paths-fp32-epyc-zen4);
# 1.0 chooses right on both. The float32 rates of block bases are set to choose right in
# benchmarks/results/layer-epyc-zen5.
_CPU_FP32 = Rates(1.0, 2.0, 0.36, 4.0, 117.0, 0.0, 66.0, 1.4, 0.5, 100.0, 0.0)
_CPU_16BIT = Rates(2.8, 9.7, 1.5, 25.0, 406.0, 0.0, 750.0, 1.2, 2.7, 750.0, 1200.0)
# Estimates, not measured: an H100 in bf16, relative to its GEMM's 399 T multiply-adds/s.
_CUDA_LISTS = Rates(2.5, 102.0, 0.0, 1130.0, 0.0, 0.0, 1230.0, 0.0, 0.0, 0.0, 0.0)
_CUDA_PLANES = Rates(2.5, 0.0, 2.5, 0.0, 0.0, 10.0, 2360.0, 0.0, 0.0, 0.0, 0.0)
_CUDA_BLOCKS = Rates(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.3, 27.0, 3200.0, 0.0)
_CUDA_DENSE = Rates(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 800.0, 1.0, 800.0)
_CUDA = {
    "lists": _CUDA_LISTS,
    "planes": _CUDA_PLANES,
    "blocks": _CUDA_BLOCKS,
    "dense": _CUDA_DENSE,
}


def rates(device_type: str, dtype: torch.dtype, basis_format: str) -> Rates:
    if device_type == "cuda":
        return _CUDA[basis_format]
    return _CPU_FP32 if dtype in (torch.float32, torch.float64) else _CPU_16BIT
