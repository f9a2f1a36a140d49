"""What 16-bit layers err by: plain PyTorch in 16 bits, PEFT's fp32 adapters, our kernels. A table.

    python benchmarks/gpu/errors_in_16_bits.py    on a card, or with its library serving the CPU

Relative to float64, in the 2-norm: the root mean square over layers of two densities.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/gpu"), str(ROOT / "tests/helpers"), str(ROOT)]

import torch  # noqa: E402
from gpu_helpers import DRY, NAMES, run_linear, run_linear_by_cpu_kernels  # noqa: E402
from layer_cases import Layer, exact, forward_backward, make_layer, plain, rms_error  # noqa: E402

from randlora_ext.reference import linear_reference  # noqa: E402


def fp32_adapter(layer: Layer) -> dict[str, torch.Tensor]:
    """As PEFT does by default: x goes to fp32, and only the sum with the base output to 16 bits."""
    A, B = layer.basis.dense(dtype=torch.float32)

    def forward(x, lam, gam):
        y = linear_reference(x.float(), None, None, A, B, lam, gam, layer.scaling)
        return (torch.nn.functional.linear(x, layer.weight, layer.bias) + y).to(x.dtype)

    return forward_backward(forward, layer)


def main() -> None:
    device = torch.device("cpu" if DRY else "cuda")
    ways = {"plain PyTorch in 16 bits": plain, "PEFT's fp32 adapter": fp32_adapter}
    ways["our CPU kernels"] = run_linear_by_cpu_kernels
    ways["our CUDA kernels"] = lambda layer: run_linear(layer, device)
    print("| dtype | |", " | ".join(NAMES), "|")
    for dtype in (torch.bfloat16, torch.float16):
        layers = [make_layer(256, 192, 16, density, 256, dtype) for density in (1 / 3, 0.07)]
        oracles = [exact(layer) for layer in layers]
        for way, function in ways.items():
            squares = dict.fromkeys(NAMES, 0.0)
            for layer, oracle in zip(layers, oracles, strict=True):
                results = function(layer)
                for name in NAMES:
                    squares[name] += rms_error(results[name], oracle[name]) ** 2 / len(layers)
            errors = " | ".join(f"{squares[name] ** 0.5:.1e}" for name in NAMES)
            print(f"| {str(dtype).removeprefix('torch.')} | {way} | {errors} |", flush=True)


if __name__ == "__main__":
    main()
