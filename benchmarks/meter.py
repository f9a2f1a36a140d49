"""How much does `forgetting` vary from text to text, and how much do samples vary?

    python examples/smollm2.py --out ours
    python examples/smollm2.py --lora --lr 3e-3 --out lora
    python benchmarks/meter.py ours lora

Of the adapters that the demo saved, on texts of other seeds: `forgetting`, which compares whole
distributions; the standard error that it states; the rise of the loss on the same tokens, which
compares the probabilities of the one that was drawn. Beside the first adapter the ratio of each
other one, on the same text.
"""

import argparse
import statistics
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

import randlora_ext.peft
from randlora_ext.own_text import own_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="each by examples/smollm2.py")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8, help="of a text, 128 tokens each at most")
    options = parser.parse_args()
    randlora_ext.peft.enable()
    base = AutoModelForCausalLM.from_pretrained(options.folders[0] / "base").eval()
    texts = [own_text(base, rows=options.rows, seed=seed) for seed in range(options.texts)]
    first: list[float] = []
    for folder in options.folders:
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        model = PeftModel.from_pretrained(base, folder / "adapter").eval()
        found = [randlora_ext.forgetting(model, text) for text in texts]
        nats = [each.nats for each in found]
        first = first or nats
        print(f"\n{folder.name}")
        report("forgetting", nats)
        report("standard error, stated", [each.standard_error for each in found])
        report("rise of the loss", [rise_of_loss(model, text) for text in texts])
        report("times the first adapter's", [a / b for a, b in zip(nats, first, strict=True)])


def report(name: str, values: list[float]) -> None:
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    each = " ".join(f"{value:.3f}" for value in values)
    print(f"{name}: {each}; mean {mean:.3f}, standard deviation {deviation:.3f}")


@torch.no_grad()
def rise_of_loss(model: PeftModel, text: list[dict[str, Tensor]]) -> float:
    """In nats per token."""
    tokens = sum(int((batch["labels"] != -100).sum()) for batch in text)

    def loss() -> float:
        losses = (model(**batch, use_cache=False, num_items_in_batch=1).loss for batch in text)
        return sum(float(each) for each in losses) / tokens  # of sums, by num_items_in_batch

    tuned = loss()
    with model.disable_adapter():
        return tuned - loss()


if __name__ == "__main__":
    main()
