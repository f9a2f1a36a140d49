"""How much does `forgetting` vary from text to text, and how much do samples vary?

    python examples/smollm2.py --out ours
    python examples/smollm2.py --lora --lr 3e-3 --out lora
    python benchmarks/meter.py ours lora

Of the adapters that the demo saved, on texts of other seeds: `forgetting`, which compares whole
distributions; the standard error that it states; and the rise of the loss on the same text, which
compares the tokens that were drawn alone. Then how many times as much as the first adapter each has
forgotten of the same text.
"""

import argparse
import operator
import statistics
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

import randlora_ext.peft
from randlora_ext.own_text import NO_LABEL, own_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="each by examples/smollm2.py")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8, help="of a text")
    parser.add_argument("--tokens", type=int, default=128, help="of a row, at most")
    options = parser.parse_args()
    randlora_ext.peft.enable()
    base = AutoModelForCausalLM.from_pretrained(options.folders[0] / "base").eval()
    seeds = range(options.texts)
    texts = [own_text(base, options.rows, options.tokens, seed=seed) for seed in seeds]
    of_first: list[float] = []
    for folder in options.folders:
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        model = PeftModel.from_pretrained(base, folder / "adapter").eval()
        found = [randlora_ext.forgetting(model, text) for text in texts]
        nats = [each.nats for each in found]
        of_first = of_first or nats
        print(f"\n{folder.name}")
        report("forgetting", nats)
        report("standard error, stated", [each.standard_error for each in found])
        report("rise of the loss", [rise_of_loss(model, text) for text in texts])
        report("times the first adapter's", [a / b for a, b in zip(nats, of_first, strict=True)])


def report(name: str, values: list[float]) -> None:
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    each = " ".join(f"{value:.3f}" for value in values)
    print(f"{name}: {each}; mean {mean:.3f}, standard deviation {deviation:.3f}")


def rise_of_loss(model: PeftModel, text: list[dict[str, Tensor]]) -> float:
    """In nats per token."""
    tuned = loss_on(model, text)
    with model.disable_adapter():
        return tuned - loss_on(model, text)


@torch.no_grad()
def loss_on(model: PeftModel, text: list[dict[str, Tensor]]) -> float:
    """A mean over all tokens that count; rows differ in length."""
    tokens = [int((row["labels"] != NO_LABEL).sum()) for row in text]
    losses = [float(model(**row).loss) for row in text]
    return sum(map(operator.mul, losses, tokens)) / sum(tokens)


if __name__ == "__main__":
    main()
