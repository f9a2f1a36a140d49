"""What the inputs of each kind of layer consist of: 2% of the features, and one vector.

    python benchmarks/finetune_inputs.py --out benchmarks/results/inputs-NAME

By text and kind of layer shares of the inputs' energy, means over SmolLM2's layers. few: of the
largest 2% of the features. mean: of the mean over the tokens. scaled: of the mean once the inputs
are divided by their size alone, p = 0; calibrated: weighed by what varies in the batches, too.
"""

import argparse
import json
import statistics
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # spelling.py

from finetune_batches import BATCH, to_calibrate_with
from finetune_models import TARGETS, adapted, loaded
from finetune_scales import other_vectors
from finetune_tasks import TASKS, TEXTS, examples
from spelling import plan_batches


def shares(x, scales: dict) -> dict[str, float]:
    energy = x.square().mean(0)
    few = energy.sort(descending=True).values[: max(1, round(0.02 * len(energy)))]
    found = {"few": float(few.sum() / energy.sum())}
    for name, scale in scales.items():
        y = x * scale
        found[name] = float(y.mean(0).square().sum() / y.square().mean(0).sum())
    return found


def inputs_of_layers(model: str) -> dict[str, dict[str, dict[str, float]]]:
    tuned = adapted(model, "hadamard", 0, 32, "all")
    read = to_calibrate_with("", plan_batches(examples("spelling")[0], 4, BATCH, 0), model)
    by_size, calibrated = (other_vectors(tuned, read, [], p=p) for p in ("0", "2"))
    texts = {name: text() for name, text in TEXTS.items()}
    for task in TASKS:
        pairs = examples(task)[0][:100]
        texts[task] = "\n".join(f"{asked} {answer}" for asked, answer in pairs)
    return {
        text: of_text(tuned, content, by_size, calibrated, loaded(model)[0])
        for text, content in texts.items()
    }


@torch.no_grad()
def of_text(tuned, content: str, by_size: dict, calibrated: dict, tokenizer) -> dict:
    seen: dict[str, list[dict[str, float]]] = {}

    def watch(layer, inputs, target: str):
        scales = {"mean": 1.0, "scaled": by_size[layer], "calibrated": calibrated[layer]}
        seen.setdefault(target, []).append(shares(inputs[0].flatten(0, -2), scales))

    with ExitStack() as held:
        for path, layer in tuned.named_modules():
            if layer in by_size:
                hook = partial(watch, target=path.rpartition(".")[2])
                held.enter_context(layer.register_forward_pre_hook(hook))
        tuned(torch.tensor([tokenizer(content[-8192:])["input_ids"][-512:]]))
    return {
        target: {name: round(statistics.fmean(s[name] for s in found), 3) for name in found[0]}
        for target, found in seen.items()
    }


def table(found: dict) -> str:
    """By kind of layer and text: shares of energy of 2% of the features, and of the mean."""
    lines = [f"| layers | {' | '.join(found)} |\n|{'---|' * (len(found) + 1)}"]
    for target in TARGETS["all"]:
        cells = (
            f"{found[text][target]['few']:.0%}, {found[text][target]['mean']:.0%}" for text in found
        )
        lines.append(f"| {target} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("inputs"), help="write OUT.json")
    out = parser.parse_args().out.with_suffix(".json")
    found = inputs_of_layers("fp32")
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
