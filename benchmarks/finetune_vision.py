"""Does calibration help a vision model? Upright digits learned, then turned ones: what is lost.

    pip install scikit-learn
    python benchmarks/finetune_vision.py --seeds 3

The toy of examples/vision.py, a CLIP-shaped transformer for images of 8 x 8, learns all ten digits
upright. Adapters (its linear layers, no classifier) then learn them turned by 90 degrees.
Forgetting is the rise of the held-out loss on upright ones. Trained from scratch in seconds, the
model has none of the large features of a real one: it can show harm, and hardly a gain.
"""

import argparse
import copy
import json
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from record import show, write

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # vision.py

RANK = 8  # RandLoRA's; LoRA of rank 4 has about as many parameters


def adapted(base, method: str, seed: int):
    import peft
    import vision

    import randlora_ext.peft

    if method.startswith("lora"):
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=vision.TARGETS)
        return peft.get_peft_model(copy.deepcopy(base), config)
    randlora_ext.peft.enable()
    config = randlora_ext.peft.RandLoraConfig(
        r=RANK, randlora_alpha=20 * RANK, basis="hadamard", projection_prng_key=seed,
        target_modules=vision.TARGETS,
    )  # fmt: skip
    return peft.get_peft_model(copy.deepcopy(base), config)


def run_one(base, images, digits, method: str, rate: float, seed: int, steps: int) -> dict:
    import vision

    import randlora_ext

    torch.manual_seed(seed)
    model, end = adapted(base, method, seed), -vision.HELD_OUT
    turned = images.rot90(1, (2, 3))
    if method.endswith("scaled"):
        randlora_ext.calibrate(model, [{"pixel_values": turned[:64]}])

    @torch.no_grad()
    def loss(of) -> float:
        return F.cross_entropy(model.eval()(pixel_values=of[end:]).logits, digits[end:]).item()

    before = loss(images), loss(turned)
    vision.fit(model, turned[:end], digits[:end], steps, rate, told="")
    after = loss(images), loss(turned)
    return {
        "method": method, "rate": rate, "seed": seed,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "before": before[1], "held-out loss": after[1], "forgetting": after[0] - before[0],
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, help="write FILE.json")
    args = parser.parse_args(arguments)
    import vision

    base = vision.toy_model(400, known=range(10))
    images, digits = vision.load_images(base)
    rows = []
    for method, rates in (
        ("hadamard", (1e-3, 3e-3)), ("hadamard scaled", (1e-3, 3e-3)), ("lora", (3e-3, 1e-2)),
    ):  # fmt: skip
        for rate in rates:
            seeds = range(args.seeds)
            each = [run_one(base, images, digits, method, rate, s, args.steps) for s in seeds]
            means = {k: statistics.fmean(r[k] for r in each) for k in list(each[0])[3:]}
            show({"method": method, "rate": rate} | means, header=not rows)
            rows += each
    if args.out:
        write(args.out, json.loads(json.dumps(rows)))


if __name__ == "__main__":
    main()
