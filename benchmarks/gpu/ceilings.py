"""What the card can do: what it says of itself, a large copy, large matrix products.

Prints one line of JSON, which has "card" if torch sees a CUDA card.
"""

import argparse
import json

import torch

from .card import Card


def copy_rate(card: Card) -> float:
    """Bytes per second, read plus written."""
    size = (1 << 20) if card.dry else (1 << 30)
    source = torch.randint(-9, 9, (size,), dtype=torch.int8, device=card.device)
    target = torch.empty_like(source)
    return 2e3 * size / card.medians({"": lambda: target.copy_(source)})[""]


def gemm_rate(card: Card, dtype: torch.dtype, n: int) -> float:
    """Operations per second of torch's own product of random matrices; a multiply-add is two."""
    n = 128 if card.dry else n
    a, b = (torch.randn(n, n, device=card.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2e3 * n**3 / card.medians({"": lambda: torch.mm(a, b, out=out)})[""]


def facts(card: Card) -> dict[str, object]:
    if card.dry:
        return {"card": "cpu", "capability": "0.0"}
    p = torch.cuda.get_device_properties(card.device)
    return {
        "card": p.name,
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory_bytes": p.total_memory,
        "l2_bytes": p.L2_cache_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true")
    dry = parser.parse_args().dry
    found: dict[str, object] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if dry or torch.cuda.is_available():
        card = Card(dry)
        found |= facts(card) | {
            "copy_bytes_per_s": copy_rate(card),
            "bf16_flop_per_s": gemm_rate(card, torch.bfloat16, 8192),
            "fp32_flop_per_s": gemm_rate(card, torch.float32, 4096),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
