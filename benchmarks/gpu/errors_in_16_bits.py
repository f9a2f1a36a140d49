"""What 16-bit layers err by: plain PyTorch in 16 bits, PEFT's fp32 adapters, our kernels. A table.

    python benchmarks/gpu/errors_in_16_bits.py    on a card, or with its library serving the CPU

Relative to float64, in the 2-norm: the root mean square over layers of two densities.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/gpu"), str(ROOT / "tests/helpers"), str(ROOT)]

import torch  # noqa: E402
from gpu_helpers import DRY, cpu_kernels, run_linear  # noqa: E402
from layer_cases import (  # noqa: E402
    NAMES,
    Layer,
    exact,
    forward_backward,
    make_layer,
    plain,
    relative,
)

from randlora_ext.reference import linear_reference  # noqa: E402

Results = dict[str, torch.Tensor]


def fp32_adapter(layer: Layer) -> Results:
    """As PEFT does by default: x goes to fp32, and only the sum with the base output to 16 bits."""
    A, B = layer.basis.dense(dtype=torch.float32)

    def forward(x, lam, gam):
        y = linear_reference(x.float(), None, None, A, B, lam, gam, layer.scaling)
        return (torch.nn.functional.linear(x, layer.weight, layer.bias) + y).to(x.dtype)

    return forward_backward(forward, layer)


def cpu(layer: Layer) -> Results:
    with cpu_kernels():
        return run_linear(layer, "cpu")


def cuda(layer: Layer) -> Results:
    return run_linear(layer, "cpu" if DRY else "cuda")


def main() -> None:
    ways = {"plain PyTorch in 16 bits": plain, "PEFT's fp32 adapter": fp32_adapter}
    print("| dtype | |", " | ".join(NAMES), "|")
    for dtype in (torch.bfloat16, torch.float16):
        layers = [make_layer(256, 192, 16, density, 256, dtype) for density in (1 / 3, 0.07)]
        pairs = [(layer, exact(layer)) for layer in layers]
        for way, function in (ways | {"CPU": cpu, "CUDA": cuda}).items():
            results = [(function(layer), oracle) for layer, oracle in pairs]
            squares = [
                sum(relative(got[name], want[name]) ** 2 / 2 for got, want in results)
                for name in NAMES
            ]
            errors = " | ".join(f"{square**0.5:.1e}" for square in squares)
            print(f"| {str(dtype).removeprefix('torch.')} | {way} | {errors} |", flush=True)


if __name__ == "__main__":
    main()
