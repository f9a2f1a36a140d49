"""What the card can do: the facts it tells of itself, a large copy and a large matrix product.

The floors of kernels.py are counted against these two rates, as measured; datasheets are leads.
"""

import torch

from .card import Card
from .stage import Stage


def facts(card: Card) -> dict:
    if card.dry:
        return {"card": "cpu", "capability": "0.0", "multiprocessors": 1, "clock_hz": 1.7e9,
                "memory_bytes": 0, "l2_bytes": 0}  # fmt: skip
    p = torch.cuda.get_device_properties(card.device)
    return {
        "card": p.name,
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "clock_hz": (getattr(p, "clock_rate", 0) or 1_700_000) * 1e3,
        "memory_bytes": p.total_memory,
        "l2_bytes": p.L2_cache_size,
        "devices": torch.cuda.device_count(),
    }


def copy_rate(card: Card) -> float:
    """Bytes per second, read and written ones counted."""
    size = (1 << 20) if card.dry else (1 << 30)
    source = torch.randint(-9, 9, (size,), dtype=torch.int8, device=card.device)
    target = torch.empty_like(source)
    ms = card.medians({"copy": lambda: target.copy_(source)}, 0.5, most=20)["copy"]
    return 2 * size / (ms * 1e-3)


def gemm_rate(card: Card, dtype: torch.dtype) -> float:
    """Operations per second (a multiply-add is two) of torch's own matrix product, random data."""
    n = 128 if card.dry else 8192 if dtype is torch.bfloat16 else 4096
    a, b = (torch.randn(n, n, device=card.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    ms = card.medians({"gemm": lambda: torch.mm(a, b, out=out)}, 0.5, most=20)["gemm"]
    return 2 * n**3 / (ms * 1e-3)


def main() -> None:
    stage = Stage(__doc__)
    if not stage.dry and not torch.cuda.is_available():
        stage.skip("everything", f"torch {torch.__version__} sees no CUDA card")
        return
    card = Card(stage.dry)
    known = facts(card)
    lanes = 64 if known["capability"] == "8.0" else 128
    stage.row(
        **known,
        torch=torch.__version__,
        copy_bytes_per_s=copy_rate(card),
        bf16_flop_per_s=gemm_rate(card, torch.bfloat16),
        fp32_flop_per_s=gemm_rate(card, torch.float32),
        # Outside matrix units, a clock and multiprocessor: 128 fp32 multiply-adds (64 on sm_80) and
        # 64 integer operations.
        fma_per_s=known["multiprocessors"] * lanes * known["clock_hz"],
        integer_per_s=known["multiprocessors"] * 64 * known["clock_hz"],
    )


if __name__ == "__main__":
    main()
