"""What finetune.py scales the inputs by: the vectors of `randlora_ext.calibrate`, and others."""

import math
from unittest import mock

import torch
from finetune_batches import to_calibrate_with, written
from finetune_models import adapted
from torch import Tensor, nn

from randlora_ext import calibration


def scale_inputs(tuned: nn.Module, method: str, on: str, batches: list, targets, model) -> None:
    """Gives `tuned` vectors, measured and computed as `on` says, the words behind "scaled"."""
    if method != "hadamard":
        ours = adapted(model, "hadamard", 0, 32, targets)
        scale_inputs(ours, "hadamard", on, batches, targets, model)
        layers = dict(tuned.named_modules())
        for path, layer in ours.named_modules():
            if hasattr(layer, "set_input_scale"):
                wrap(layers[path], layer.randlora_input_scale["default"])
        return
    options = dict(word.split("=") for word in on.split())
    read = to_calibrate_with(options.pop("on", ""), batches, model)
    own = written(options.pop("own", "own"), model)
    if not options:
        with mock.patch.object(calibration, "own_text", lambda writer: own):
            calibration.calibrate(tuned, read)
        return
    for layer, vector in other_vectors(tuned, read, own, **options).items():
        layer.set_input_scale("default", vector)


def wrap(layer: nn.Module, scale: Tensor) -> None:
    """It computes base(x) + (layer(x * scale) - base(x * scale))."""
    base, stock = layer.get_base_layer(), layer.forward
    layer.forward = lambda x: base(x) + (stock(x * scale) - base(x * scale))


@torch.no_grad()
def other_vectors(tuned, read, own, p: str = "2", strength: str = "one") -> dict:
    """By formulas in which the share of energy that varies is that of the batches alone.

    p: the power of that share. strength: "one" for all layers, which makes the median layer answer
    a random dW as strongly as any other model's; "limited" as `calibrate`'s, by what a step of each
    layer costs, measured on `own`; "F-1/2" the same without a limit.
    """
    layers = calibration.layers_to_calibrate(tuned)
    in_batches = calibration.seen_in_batches(tuned, read, layers)
    with mock.patch.object(calibration, "POWER", float(p)):
        profiles = calibration.profiles_of(in_batches, None)
    if strength == "one":
        strengths = calibration.equal_strengths(profiles, in_batches)
    else:
        with mock.patch.object(calibration, "own_text", lambda writer: own):
            in_own_text = calibration.seen_in_own_text(tuned, layers)
        by_cost = {"limited": calibration.strengths_by_cost, "F-1/2": unlimited}[strength]
        strengths = by_cost(profiles, in_own_text)
    return {
        layer: (strengths[name] * profiles[name]).float().view(*layer.experts, -1)
        for name, layer in layers.items()
    }


def unlimited(profiles: dict, in_own_text: dict) -> dict[str, float]:
    """A step costs the same in every layer, and COST in all together."""
    of_each = calibration.COST / len(profiles)
    return {
        name: math.sqrt(of_each / calibration.cost_of(in_own_text[name], profile))
        for name, profile in profiles.items()
    }
