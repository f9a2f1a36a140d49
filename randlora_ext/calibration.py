"""`calibrate`: adapters that learn as much and forget less, by the scale of their inputs."""

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .batches import check_batches
from .checks import at_most_ten, check_model, warn_user
from .layer_statistics import Sums, add_up, average, differentiate, observe
from .nn.adapted_layer import AdaptedLayer, layers_by_name
from .own_text import own_text, writes_without_prompts
from .ranks import failing_together, full_tensor, gathered, of_all_ranks

POWER = 2  # of the share of a feature's energy that varies; docs/ablations.md compares others
EPSILON = 0.1  # in medians of rms: small features are not blown up without bound
FLOOR = 1e-3  # in medians of the profile: no feature is lost entirely, so dW keeps its rank
COST = 250.0  # of a step in all layers together; one learning rate then fits all models
RESPONSE = 1.5  # of the median layer to a random dW, for models that write no text; likewise
FEW_TOKENS = 32  # fewer do not tell what varies

Layers = Mapping[str, AdaptedLayer]  # by their names in the model


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
    """Measures every input feature, and scales the adapters' inputs: features that are large, or
    nearly the same at every token, count for less.

    An uncalibrated adapter learns mostly from a few such features, and shifts the outputs of all
    tokens (docs/how-it-works.md). Call this once, after adding the adapters and before training::

        loader = torch.utils.data.DataLoader(texts, batch_size=8)  # batches as in training
        randlora_ext.calibrate(model, itertools.islice(loader, 4))

    A few hundred tokens of the training data suffice (docs/ablations.md). Every active adapter on
    Hadamard bases, unless it is frozen, gets the vector ``input_scale`` (in_features,), float32:

        rms = x.square().mean(0).sqrt()             x (tokens, in), of the batches
        varying = 1 - (x.mean(0) / rms).square()    the share of its energy that varies
        profile = (varying * varying_in_own_text).square() / (rms + 0.1 * rms.median())
        profile = profile.clamp_min(profile.median() / 1000)
        profile = profile / profile.square().mean().sqrt()

    times the strength of the layer, one number, which is smaller where a step costs more than in
    the median layer (docs/how-it-works.md). varying_in_own_text is measured on `own_text`, 8 rows
    that the base model writes. So is the cost, with the gradients of the summed loss to the layer's
    outputs, (tokens, out)::

        cost = gradients.square().mean(0).sum() * (profile * x).square().mean(0).sum()

    Then, with the costs of all layers::

        median = statistics.median(cost[cost > 0].tolist())
        strength = cost.clamp_min(median).rsqrt()
        strength = strength * (250 / (strength.square() * cost).sum()).sqrt()
        input_scale = strength * profile

    A step in all layers so costs 250 in every model, and one learning rate serves all. A layer that
    the text does not reach, as of an encoder of images, costs nothing and is as strong as the
    median layer. Where the text brings fewer than 32 tokens, the batches alone tell what varies.
    They always do if the model gives no ``loss``, needs more than text, or cannot write any (it has
    no ``generate``, or is an encoder and decoder). Then all layers get the same strength. It is
    chosen so that, in the median layer, a dW of independent random numbers of variance 1 would
    change the outputs y (tokens, out) by 1.5 times their root mean square::

        response = ((x * profile).square().sum() / y.square().mean(1).sum()).sqrt()
        strength = 1.5 / statistics.median(responses)

    From then on the adapter computes ``F.linear(x * input_scale, dW)``. This costs no parameter and
    next to no time, because the vector is a factor of the bases' signs. It belongs to the adapter:
    the layer's buffer ``randlora_input_scale``, which files and state dicts hold. Called again, it
    replaces the vectors. Of adapters of ``target_parameters`` every expert gets a vector of its
    own, ``input_scale`` (experts, in_features); where it sees fewer than 32 tokens, those of all
    experts count. The strength is that of all experts, whose costs count by their tokens.

    A batch takes a forward pass. The text takes `own_text`, and then eight batches of one row, each
    two forward passes and a backward one. No parameter gets a gradient there, and gradient
    checkpointing acts, so they need less memory than a training step.

    Args:
        model: with adapters on Hadamard bases. It runs in eval mode; afterwards each module is in
            its old mode, and each parameter has its old gradient.
        batches: several of what the model takes: a tensor, a tuple or list of arguments, or a
            mapping of keyword arguments. These are moved to the device of the model's first
            parameter. If the mapping has an "attention_mask" (batch, tokens), its zeros leave out
            tokens in layers whose inputs are (batch, tokens, in_features) or (batch * tokens,
            in_features); experts do not leave out any. A decoder beside an encoder leaves out the
            zeros of "decoder_attention_mask", or else tokens with a label of -100.

    Returns:
        The strength of every layer that saw a token, by its name in the model.

    If torch.distributed is initialized, all ranks must call, each with its own batches, equally
    many if FSDP2 or DeepSpeed's ZeRO-3 has sharded the model: sums over all ranks give all of them
    equal vectors.

    Raises, and leaves every adapter as it was: TypeError if model is no module, or batches is one
    tensor or mapping or holds something else; ValueError if no active adapter that trains is on
    Hadamard bases, one has trained already (its lambda is not zero), is merged or on the meta
    device, no batch comes, or inputs or outputs hold NaN or infinity; RuntimeError in
    torch.inference_mode, and on the other ranks if one fails.
    Warns, once, of layers that see no token or only zeros, which stay as they are, of own text on
    which something is not finite, of a model that needs more than text, and of an "attention_mask"
    of another form, whose padding counts. Experts must multiply by their parameter or a part of it,
    by torch's functions for products (not einsum), as those of transformers do unless
    ``experts_implementation`` is "batched_mm".

    Source: ours. The same statistic serves quantization in AWQ and SmoothQuant; PEFT's EVA and
    CorDA measure activations to initialize LoRA.
    """
    check_model(model)
    check_batches(batches)
    if torch.is_inference_mode_enabled():
        raise RuntimeError("calibrate takes gradients; call it outside of torch.inference_mode")
    layers = layers_to_calibrate(model)
    in_batches = seen_in_batches(model, batches, layers)
    in_own_text = seen_in_own_text(model, layers)
    profiles = profiles_of(in_batches, in_own_text)
    strengths = strengths_by_cost(profiles, in_own_text) or equal_strengths(profiles, in_batches)
    for name, strength in strengths.items():
        layer = layers[name]
        input_scale = (strength * profiles[name]).float().view(*layer.experts, -1)
        for adapter in adapters_to_calibrate(layer):
            layer.set_input_scale(adapter, input_scale)
    return strengths


def profile_of(rms: Tensor, *shares: Tensor) -> Tensor:
    """`profile` as `calibrate` says: an input scale but for the layer's strength.

    `rms` is the root mean square of each feature. Each of `shares` is the share of its energy that
    varies, in one text; they are multiplied.
    A share that would leave no feature varying, as after a single token, is left out. If over half
    of the numbers are zero, the median is that of the others.
    """
    varying = torch.ones_like(rms)
    for share in shares:
        if (varying * share)[rms > 0].max() >= 1e-6:  # less is what rounding leaves of zero
            varying = varying * share
    profile = varying**POWER / (rms + EPSILON * _median(rms))
    profile = profile.clamp_min(FLOOR * _median(profile))
    return profile / profile.square().mean().sqrt()


def _median(values: Tensor) -> Tensor:
    median = values.median()
    return median if median > 0 else values[values > 0].median()


def seen_in_batches(model: nn.Module, batches: Iterable[Any], layers: Layers) -> dict[str, Sums]:
    """What the layers see on all ranks. ValueError if no rank has a batch, or inputs or outputs are
    not finite."""
    sums = {layer: Sums.of(layer) for layer in layers.values()}
    count = 0
    with failing_together():
        for batch in batches:
            _check_batch(batch)
            observe(model, batch, sums)
            count += 1
    if not any(of_all_ranks(count)):
        raise ValueError("batches must hold at least one batch, got none")
    add_up(sums)
    for name, layer in layers.items():
        if not _is_finite(sums[layer]):
            raise ValueError(f"the inputs or outputs of layer {name!r} hold NaN or infinity")
    return {name: sums[layer] for name, layer in layers.items()}


def seen_in_own_text(model: nn.Module, layers: Layers) -> dict[str, Sums] | None:
    """Likewise, with gradients, on text that the model writes. None if it writes none or gives no
    loss of it, or, with a warning, if it cannot read it or something is not finite."""
    if not writes_without_prompts(model):
        return None
    sums = {layer: Sums.of(layer) for layer in layers.values()}
    why = ""
    with failing_together():
        try:
            for row in own_text(model):
                observe(model, row, sums)
                if not differentiate(model, row, sums):
                    return None
        except Exception as error:
            if not _refuses_text(error):
                raise
            why = f"the model cannot read text alone: {error!r}"
    average(sums)  # all ranks write the same text
    for name, layer in layers.items():
        if not _is_finite(sums[layer]):
            why = why or (
                f"inputs, outputs or gradients of layer {name!r} are not finite on text that the "
                "model wrote"
            )
    if why := next(filter(None, of_all_ranks(why)), ""):
        warn_user(f"the batches alone count, and all layers get the same strength: {why}")
        return None
    return {name: sums[layer] for name, layer in layers.items()}


def _refuses_text(error: Exception) -> bool:
    """A model that needs more than text may fail in any way where the rest is missing. A
    RuntimeError is torch's: too little memory, a device or a rank that failed."""
    if isinstance(error, NotImplementedError):  # a RuntimeError to Python, but not of torch
        return True
    return not isinstance(error, (RuntimeError, MemoryError))


def _is_finite(sums: Sums) -> bool:
    return all(bool(total.isfinite().all()) for total in vars(sums).values())


def profiles_of(
    in_batches: Mapping[str, Sums], in_own_text: Mapping[str, Sums] | None
) -> dict[str, Tensor]:
    """Those of `calibrate`, (experts, in_features), by the names of layers; a warning, and none, if
    a layer has seen nothing."""
    profiles = {}
    unseen = []
    for name, seen in in_batches.items():
        if bool(seen.squares.any()):
            profiles[name] = _profile_of_experts(seen, in_own_text[name] if in_own_text else None)
        else:
            unseen.append(name)
    if unseen:
        warn_user(
            f"batches brought no token to {len(unseen)} of {len(in_batches)} layers, or only "
            f"masked ones and zeros; these stay as they were: {at_most_ten(unseen)}"
        )
    return profiles


def _profile_of_experts(in_batches: Sums, in_own_text: Sums | None) -> Tensor:
    """Each has a root mean square of 1."""
    rms, varying = _size_and_share(in_batches)
    shares = [varying]
    if in_own_text is not None and in_own_text.tokens.sum() >= FEW_TOKENS:
        _, varying_in_own_text = _size_and_share(in_own_text)
        shares.append(varying_in_own_text)
    return torch.stack([profile_of(*each) for each in zip(rms, *shares, strict=True)])


def _size_and_share(sums: Sums) -> tuple[Tensor, Tensor]:
    """`rms` and `varying`, (experts, in_features); features that are always zero count as varying.
    An expert that saw few tokens has those of all experts."""
    enough = (sums.tokens >= FEW_TOKENS) & sums.squares.any(1, keepdim=True)
    squares, values, tokens = (
        torch.where(enough, each, each.sum(0)) for each in (sums.squares, sums.values, sums.tokens)
    )
    rms, mean = (squares / tokens).sqrt(), values / tokens
    varying = torch.where(rms > 0, 1 - (mean / rms).square(), 1).clamp(0, 1)
    return rms, varying


def strengths_by_cost(
    profiles: Mapping[str, Tensor], in_own_text: Mapping[str, Sums] | None
) -> dict[str, float] | None:
    """One for each layer, as `calibrate` says; None if the model has written no text, or it reaches
    no layer."""
    if in_own_text is None:
        return None
    costs = {name: cost_of(in_own_text[name], profile) for name, profile in profiles.items()}
    reached = [cost for cost in costs.values() if cost > 0]
    if not reached:
        return None
    median = statistics.median(reached)
    strengths = {name: 1 / math.sqrt(max(cost, median)) for name, cost in costs.items()}
    unit = math.sqrt(COST / sum(strengths[name] ** 2 * costs[name] for name in costs))
    return {name: unit * strength for name, strength in strengths.items()}


def equal_strengths(profiles: Mapping[str, Tensor], sums: Mapping[str, Sums]) -> dict[str, float]:
    """That of all layers, as `calibrate` says, by the batches alone."""
    responses = [_response(sums[name], profile) for name, profile in profiles.items()]
    # Infinite where the outputs are zero.
    responses = [response for response in responses if math.isfinite(response)]
    strength = RESPONSE / statistics.median(responses) if responses else 1.0
    return dict.fromkeys(profiles, strength)


def _response(sums: Sums, profile: Tensor) -> float:
    """To a dW of independent random elements of variance 1: the root mean square of what it would
    add to the outputs, over theirs."""
    added = (sums.squares * profile.square()).sum()
    return float((added / sums.outputs.sum()).sqrt())


def cost_of(sums: Sums, profile: Tensor) -> float:
    """As `calibrate` says; of experts the mean, by their tokens."""
    tokens = sums.tokens.clamp_min(1)
    gradients = (sums.gradients / tokens).sum(1)
    inputs = (sums.squares / tokens * profile.square()).sum(1)
    weights = sums.tokens.squeeze(1)
    return float(weights @ (gradients * inputs) / weights.sum().clamp_min(1))


def _check_batch(batch: Any) -> None:
    if not isinstance(batch, (Tensor, Mapping, tuple, list)):
        raise TypeError(
            "batches must hold what the model takes, each a tensor, a tuple or list of arguments, "
            f"or a mapping of keyword arguments, got {batch!r}"
        )


def layers_to_calibrate(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Those with adapters to calibrate; ValueError if there are none, or one of these adapters
    cannot be calibrated."""
    found = layers_by_name(model).items()
    layers = {name: layer for name, layer in found if adapters_to_calibrate(layer)}
    if not layers:
        raise ValueError(
            "model has no active adapter on Hadamard bases that trains, and only these can scale "
            'their inputs; add one with basis="hadamard", or load yours with is_trainable=True'
        )
    with gathered(lam for layer in layers.values() for lam in layer.randlora_lambda.values()):
        for name, layer in layers.items():
            _refuse_merged_or_trained(name, layer)
    return layers


def adapters_to_calibrate(layer: AdaptedLayer) -> list[str]:
    """The active ones on Hadamard bases that train; one that is frozen keeps what it has."""
    return [name for name in layer._trained_adapters() if name in layer.randlora_input_scale]


def _refuse_merged_or_trained(name: str, layer: AdaptedLayer) -> None:
    for adapter in adapters_to_calibrate(layer):
        if adapter in layer.merged_adapters:
            raise ValueError(f"adapter {adapter!r} of layer {name!r} is merged; unmerge it first")
        if layer.randlora_lambda[adapter].is_meta:
            raise ValueError(f"lambda of layer {name!r} has no numbers (meta device)")
        if bool(full_tensor((layer.randlora_lambda[adapter] != 0).any())):
            raise ValueError(
                f"adapter {adapter!r} of layer {name!r} has trained (its lambda is not zero), and "
                "another scale would change what it has learned; calibrate before training"
            )
