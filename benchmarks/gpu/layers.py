"""One layer in bf16, forward and backward, by every method, over sizes, tokens and bases.

`parity` checks the same layers against float64. With --hadamard only the frozen layer, LoRA and
Hadamard bases. x needs a gradient, as inside a model. step_ms: forward and backward as a CUDA
graph, L2 flushed before. forward_ms: the same without gradients. eager_ms: forward and backward
launched by Python, as a training script does.
"""

import argparse
import functools

import torch
from methods import frozen_layer, make
from torch import Tensor, nn

from . import rows
from .card import Card

SIZES = [(4096, 4096), (3072, 3072), (4096, 14336), (4096, 1024)]  # in, out
TOKENS = [8192, 840, 2048, 16, 1]  # the most telling first: time may run out
BASES = ["hadamard", "1/3", "0.07", "very_sparse"]  # a number: independent, of that density
DENSE = "dense"  # PEFT's default, which nothing packs
RANK = 32
BF16 = torch.bfloat16
Key = tuple[str, str]  # a label, and bases if it has any
METHODS = {"frozen": "frozen", "PEFT's LoRA": "lora", "PEFT's RandLoRA": "peft", "ours": "ours"}
HADAMARD: list[Key] = [("frozen", ""), ("PEFT's LoRA", ""), ("ours", "hadamard")]
ALL = [*HADAMARD, *(("ours", bases) for bases in [*BASES[1:], DENSE]), ("PEFT's RandLoRA", "")]


def layers(
    size: tuple[int, int], device: torch.device, rank: int, keys: list[Key]
) -> dict[Key, nn.Module]:
    """The methods on one frozen layer; a row names those that cannot be made."""
    base, made = frozen_layer(size, BF16).to(device), {}
    for label, bases in keys:
        try:
            made[label, bases] = make(METHODS[label], base, rank, bases or "1/3").to(device)
        except Exception as error:
            rows.failed(f"{label} {bases} {size}", error)
    return made


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return torch.autograd.grad(layer(x), leaves, dy)


def measure(card: Card, made: dict[Key, nn.Module], size: tuple[int, int], tokens: int) -> None:
    x = torch.randn(tokens, size[0], device=card.device).to(BF16).requires_grad_()
    dy = torch.randn(tokens, size[1], device=card.device).to(BF16)
    about = {"size": f"{size[0]}x{size[1]}", "tokens": tokens}
    steps, forwards, eager = {}, {}, {}
    for key, layer in made.items():
        call = functools.partial(step, layer, x, dy)
        try:
            eager[key] = card.wall(call)
            graph = card.captured(call)
            forwards[key] = card.captured(torch.no_grad()(functools.partial(layer, x)))
            steps[key] = graph
        except Exception as error:
            rows.failed(f"{key} {about}", error)
            card.sync()
    times, without = card.medians(steps), card.medians(forwards)
    for key, ms in times.items():
        rows.row(method=key[0], bases=key[1], **about, step_ms=ms, forward_ms=without[key],
                 over_frozen=ms / times["frozen", ""], eager_ms=eager[key])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--hadamard", action="store_true", help="LoRA and Hadamard bases alone")
    options = parser.parse_args()
    card, keys = Card(options.dry), HADAMARD if options.hadamard else ALL
    sizes = [(64, 64), (72, 64)] if card.dry else SIZES
    every = TOKENS[:3] if options.hadamard else TOKENS
    if card.dry:
        every = [20, 1]
    made: dict[tuple[int, int], dict[Key, nn.Module]] = {}
    for tokens in every:
        for size in sizes:
            if rows.seconds_left() < 15:
                rows.skipped(f"{size} T={tokens}")
                continue
            try:
                if size not in made:
                    made[size] = layers(size, card.device, 8 if card.dry else RANK, keys)
                measure(card, made[size], size, tokens)
            except Exception as error:
                rows.failed(f"{size} T={tokens}", error)
            card.free()


if __name__ == "__main__":
    main()
