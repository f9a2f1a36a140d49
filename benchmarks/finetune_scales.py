"""What finetune.py scales the inputs by: the vectors of `randlora_ext.calibrate`, and others."""

import statistics
from unittest import mock

import torch
from finetune_batches import to_calibrate_with, written
from finetune_models import adapted
from torch import Tensor, nn

import randlora_ext
from randlora_ext.calibration import COST, EPSILON, FLOOR, RESPONSE
from randlora_ext.layer_statistics import Sums, differentiate, observe


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
        with mock.patch("randlora_ext.calibration.own_text", lambda writer: own):
            randlora_ext.calibrate(tuned, read)
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
    sums = measured(tuned, read)
    vectors = {layer: scale_of(sums[layer], float(p)) for layer in sums}
    of_layers = {
        "one": lambda: equal_strengths(sums, vectors),
        "limited": lambda: strengths_by_cost(tuned, vectors, own, limited=True),
        "F-1/2": lambda: strengths_by_cost(tuned, vectors, own, limited=False),
    }[strength]()
    return {
        layer: (of_layers[layer] * vector).float().view(*layer.experts, -1)
        for layer, vector in vectors.items()
    }


def equal_strengths(sums: dict, vectors: dict) -> dict:
    responses = [
        float((of.squares * vectors[layer].square()).sum() / of.outputs.sum()) ** 0.5
        for layer, of in sums.items()
    ]
    return dict.fromkeys(vectors, RESPONSE / statistics.median(responses))


def strengths_by_cost(tuned, vectors: dict, own: list, limited: bool) -> dict:
    """Of layers of one expert. All layers together cost COST."""
    costs = {}
    for layer, of in measured(tuned, own, gradients=True).items():
        energy = (vectors[layer].square() * of.squares / of.tokens).sum()
        costs[layer] = float((of.gradients / of.tokens).sum() * energy)
    least = statistics.median(costs.values()) if limited else 0.0
    squares = {layer: 1 / max(cost, least) for layer, cost in costs.items()}
    total = sum(squares[layer] * costs[layer] for layer in costs)
    return {layer: (COST / total * square) ** 0.5 for layer, square in squares.items()}


def measured(tuned, batches: list[dict], gradients: bool = False) -> dict:
    layers = [layer for layer in tuned.modules() if hasattr(layer, "set_input_scale")]
    sums = {layer: Sums.of(layer) for layer in layers}
    for batch in batches:
        batch = {**batch, "use_cache": False}  # beside a cache packed texts see each other
        observe(tuned, batch, sums)
        if gradients:
            differentiate(tuned, batch, sums)
    return sums


def scale_of(sums: Sums, power: float) -> Tensor:
    """(experts, in_features), each with a root mean square of 1."""

    def median(values: Tensor) -> Tensor:
        return values.median(1, keepdim=True).values

    rms, mean = (sums.squares / sums.tokens).sqrt(), sums.values / sums.tokens
    varies = (1 - (mean / rms).square()).nan_to_num(1).clamp(min=0)
    scale = varies**power / (rms + EPSILON * median(rms))
    scale = scale.clamp(min=FLOOR * median(scale))
    return scale / scale.square().mean(1, keepdim=True).sqrt()
