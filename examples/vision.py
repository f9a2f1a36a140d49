"""RandLoRA on a vision transformer, with the handwritten digits that scikit-learn ships.

    pip install scikit-learn
    python examples/vision.py --model openai/clip-vit-base-patch32
    python examples/vision.py --toy

The toy is a CLIP-shaped model for images of 8 x 8, which learns the digits 0 to 4 before it is
frozen. The adapter and a new classifier then learn all ten.
"""

import argparse
import copy
from collections.abc import Iterable
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import AutoModelForImageClassification, CLIPConfig, CLIPForImageClassification

import randlora_ext.peft

TARGETS = ["q_proj", "k_proj", "v_proj", "fc1", "fc2"]
HELD_OUT = 360


def load_images(model) -> tuple[Tensor, Tensor]:
    """1,797 images in [-1, 1] as (images, channels, size, size), and the digits that they show."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # of 0 to 16
    vision = getattr(model.config, "vision_config", model.config)
    images = F.interpolate(images, size=(vision.image_size, vision.image_size))
    return images.expand(-1, vision.num_channels, -1, -1), torch.tensor(digits.target)


def toy_model(steps: int = 150, known: Iterable[int] = range(5)):
    """Trained from scratch on the images of these digits."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    image = {"image_size": 8, "patch_size": 2, "num_channels": 1}
    config = CLIPConfig(vision_config=shape | image | {"num_attention_heads": 4}, num_labels=10)
    model = CLIPForImageClassification(config)
    images, digits = load_images(model)
    shown = torch.isin(digits[:-HELD_OUT], torch.tensor([*known]))
    fit(model, images[:-HELD_OUT][shown], digits[:-HELD_OUT][shown], steps, 1e-3, told="")
    return model


def fit(model, images: Tensor, digits: Tensor, steps: int, lr: float, told: str = "step") -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr, weight_decay=0)
    model.train()
    for step in range(steps):
        batch = torch.randint(len(images), (64,), device=images.device)
        loss = F.cross_entropy(model(pixel_values=images[batch]).logits, digits[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if told and (step % max(1, steps // 10) == 0 or step == steps - 1):
            print(f"{told} {step}: loss {loss.item():.3f}")


@torch.no_grad()
def accuracy(model, images: Tensor, digits: Tensor) -> float:
    found = model.eval()(pixel_values=images[-HELD_OUT:]).logits.argmax(1)
    return (found == digits[-HELD_OUT:]).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="openai/clip-vit-base-patch32", help="folder or name")
    parser.add_argument("--out", type=Path, default=Path("randlora-adapter"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--toy", action="store_true", help="a tiny model, nothing is downloaded")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not args.toy else "cpu")
    if args.toy:
        args.rank, base = 8, toy_model()
    else:
        base = AutoModelForImageClassification.from_pretrained(args.model, num_labels=10)
    images, digits = (t.to(device) for t in load_images(base))

    randlora_ext.peft.enable()
    config = randlora_ext.peft.RandLoraConfig(
        r=args.rank,
        randlora_alpha=20 * args.rank,
        basis="hadamard",
        target_modules=TARGETS,
        modules_to_save=["classifier"],
    )
    model = peft.get_peft_model(copy.deepcopy(base).to(device), config)
    few = [{"pixel_values": images[i : i + 16], "labels": digits[i : i + 16]} for i in (0, 16)]
    randlora_ext.calibrate(model, few)  # to forget less
    print(randlora_ext.peft.kernel_summary(model))
    before = accuracy(model, images, digits)
    fit(model, images[:-HELD_OUT], digits[:-HELD_OUT], args.steps, args.lr)
    after = accuracy(model, images, digits)
    print(f"right of {HELD_OUT} held-out images: {before:.1%} -> {after:.1%}")

    model.save_pretrained(args.out)
    with torch.no_grad():
        want = model(pixel_values=images[:8]).logits
        loaded = peft.PeftModel.from_pretrained(base.to(device), args.out).eval()
        got = loaded(pixel_values=images[:8]).logits
    difference = float((got - want).norm() / want.norm())
    print(f"saved to {args.out}, reloaded: relative difference {difference:.1e}")


if __name__ == "__main__":
    main()
