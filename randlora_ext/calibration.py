"""`calibrate`: adapters that learn as much and forget a fraction, by the scale of their inputs."""

import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .batches import moved_to
from .checks import at_most_ten, check_model, warn_user
from .nn.adapted_layer import AdaptedLayer, layers_by_name
from .nn.expert_products import ExpertProducts
from .nn.experts import AdaptedParameter
from .ranks import full_tensor, gathered

POWER = 2  # of the share of a feature's energy that varies; docs/density.md compares others
EPSILON = 0.1  # in medians of rms: small features are not blown up without bound
FLOOR = 1e-3  # in medians of the scale: no feature is lost entirely, so dW keeps its rank
RESPONSE = 1.5  # of the median layer to a random dW; one learning rate then fits all models
FEW_TOKENS = 32  # of an expert that saw fewer, the vector is that of all experts


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Any]) -> None:
    """Measures every input feature, and scales the adapters' inputs: features that are large, or
    nearly the same at every token, count for less.

    An uncalibrated adapter learns mostly from a few such features, and shifts the outputs of all
    tokens (docs/how-it-works.md). Call this once, after adding the adapters and before training::

        loader = torch.utils.data.DataLoader(texts, batch_size=8)  # batches as in training
        randlora_ext.calibrate(model, itertools.islice(loader, 4))

    A few hundred tokens of the training data suffice (docs/density.md). Every active adapter on
    Hadamard bases gets the vector ``input_scale`` (in_features,), float32:

        rms = x.square().mean(0).sqrt()             x (tokens, in)
        varying = 1 - (x.mean(0) / rms).square()    the share of its energy that varies
        scale = varying.square() / (rms + 0.1 * rms.median())
        scale = scale.clamp_min(scale.median() / 1000)
        scale = scale / scale.square().mean().sqrt()

    times its strength, one number for the whole model, which makes its median layer answer a random
    dW as strongly as any other model's, so that one learning rate serves all
    (docs/how-it-works.md)::

        response = ((x * scale).square().sum() / y.square().mean(1).sum()).sqrt()
                                                    of each layer, whose outputs are y (tokens, out)
        input_scale = scale * 1.5 / statistics.median(responses)

    From then on the adapter computes ``F.linear(x * input_scale, dW)``. This costs no parameter and
    next to no time, because the vector is a factor of the bases' signs. It belongs to the adapter:
    the layer's buffer ``randlora_input_scale``, which files and state dicts hold. Called again, it
    replaces the vectors. Of adapters of ``target_parameters`` every expert gets a vector of its
    own, ``input_scale`` (experts, in_features); one that sees fewer than 32 tokens gets that of
    all.

    Args:
        model: with adapters on Hadamard bases, by `apply_randlora` or PEFT. It runs in eval mode;
            afterwards each module is in its old mode.
        batches: several of what the model takes: a tensor, a tuple or list of arguments, or a
            mapping of keyword arguments. These are moved to the device of the model's first
            parameter. If the mapping has an "attention_mask" (batch, tokens), its zeros leave out
            tokens in layers whose inputs are (batch, tokens, in_features) or (batch * tokens,
            in_features); experts do not leave out any.

    If torch.distributed is initialized, all ranks must call, each with its own batches, equally
    many if FSDP2 has sharded the model: sums over all ranks give all of them equal vectors.

    Raises, and leaves every adapter as it was: TypeError if model is no module, or batches is one
    tensor or mapping or holds something else; ValueError if no active adapter is on Hadamard bases,
    one has trained (its lambda is not zero) or is merged, no batch comes, or inputs or outputs hold
    NaN or infinity. Warns, once, of layers that see no token or only zeros, which stay as they are,
    and of an "attention_mask" of another form, whose padding counts. Experts must multiply by their
    parameter or a part of it, by torch's functions for products (not einsum), as those of
    transformers do unless ``experts_implementation`` is "batched_mm".

    Source: ours. The same statistic serves quantization in AWQ and SmoothQuant; PEFT's EVA and
    CorDA measure activations to initialize LoRA.
    """
    check_model(model)
    _check_batches(batches)
    layers = layers_to_calibrate(model)
    sums = {layer: _Sums.of(layer) for layer in layers}
    count = torch.zeros(1, dtype=torch.float64)
    for batch in batches:  # which may be made by other models, or by this one
        _check_batch(batch)
        _observe(model, batch, sums)
        count += 1
    _add_up_ranks([count, *(total for of_layer in sums.values() for total in of_layer.totals())])
    if not count:
        raise ValueError("batches must hold at least one batch, got none")
    input_scales = _input_scales({name: sums[layer] for layer, (name, _) in layers.items()})
    for layer, (name, adapters) in layers.items():
        if name not in input_scales:  # it has seen nothing
            continue
        for adapter in adapters:
            layer.set_input_scale(adapter, input_scales[name].view(*layer.experts, -1))


def input_scale_of(rms: Tensor, mean: Tensor) -> Tensor:
    """`scale` as `calibrate` says, an input scale before its strength, of the root mean square and
    the mean of each feature.

    Medians of which over half would be zero are those of the other features. Features that are
    always zero count as varying, and so do all if none varies, as with a single token.
    """
    seen = rms > 0
    varying = torch.where(seen, 1 - (mean / rms).square(), 1).clamp(0, 1)
    if varying[seen].max() < 1e-6:  # what rounding leaves of zero
        varying = torch.ones_like(rms)
    scale = varying**POWER / (rms + EPSILON * _median(rms))
    scale = scale.clamp_min(FLOOR * _median(scale))
    return scale / scale.square().mean().sqrt()


def _median(values: Tensor) -> Tensor:
    median = values.median()
    return median if median > 0 else values[values > 0].median()


@dataclass
class _Sums:
    """What the experts of a layer have seen; a linear layer is one expert. On the CPU."""

    squares: Tensor  # (experts, in_features) float64: of x * x over the tokens
    values: Tensor  # likewise, of x
    tokens: Tensor  # (experts, 1) float64: how many
    outputs: Tensor  # likewise: of the mean square of each token's outputs

    @classmethod
    def of(cls, layer: AdaptedLayer) -> "_Sums":
        experts = math.prod(layer.experts)
        widths = layer.in_features, layer.in_features, 1, 1
        return cls(*(torch.zeros(experts, width, dtype=torch.float64) for width in widths))

    def totals(self) -> tuple[Tensor, ...]:
        return self.squares, self.values, self.tokens, self.outputs

    def add(self, x: Tensor, y: Tensor, expert: int = 0) -> None:
        """Tokens x (tokens, in_features) and what became of them, y (tokens, out_features)."""
        if not len(x):
            return
        x, y = x.float(), y.float()
        self.squares[expert] += x.square().sum(0, dtype=torch.float64).cpu()
        self.values[expert] += x.sum(0, dtype=torch.float64).cpu()
        self.tokens[expert] += len(x)
        self.outputs[expert] += y.square().mean(1).sum(dtype=torch.float64).cpu()

    def scales(self) -> Tensor:
        """`scale` as `calibrate` says, (experts, in_features), each of root mean square 1. An
        expert that saw few tokens has the vector of all experts."""
        enough = (self.tokens >= FEW_TOKENS) & self.squares.any(1, keepdim=True)
        squares, values, tokens, _ = (torch.where(enough, t, t.sum(0)) for t in self.totals())
        rms, mean = (squares / tokens).sqrt(), values / tokens
        return torch.stack([input_scale_of(*each) for each in zip(rms, mean, strict=True)])

    def response(self, scales: Tensor) -> float:
        """To a dW of independent random elements of variance 1: the root mean square of what it
        would add to the outputs, over theirs."""
        added = (self.squares * scales.square()).sum()
        return float((added / self.outputs.sum()).sqrt())


def _input_scales(sums: Mapping[str, _Sums]) -> dict[str, Tensor]:
    """The input scales by the names of layers. ValueError if inputs are not finite; a warning, and
    none, if a layer has seen nothing."""
    scales = {}  # before their strength, as `calibrate` says
    unseen = []
    for name, of_layer in sums.items():
        if not all(bool(total.isfinite().all()) for total in of_layer.totals()):
            raise ValueError(f"the inputs or outputs of layer {name!r} hold NaN or infinity")
        if bool(of_layer.squares.any()):
            scales[name] = of_layer.scales()
        else:
            unseen.append(name)
    if unseen:
        warn_user(
            f"batches brought no token to {len(unseen)} of {len(sums)} layers, or only masked ones "
            f"and zeros; these stay as they were: {at_most_ten(unseen)}"
        )
    responses = [sums[name].response(scale) for name, scale in scales.items()]
    responses = [response for response in responses if math.isfinite(response)]  # outputs are zero
    strength = RESPONSE / statistics.median(responses) if responses else 1.0
    return {name: (strength * scale).float() for name, scale in scales.items()}


def _check_batches(batches: Any) -> None:
    """Raises TypeError unless they can be several batches."""
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        got = "one tensor or mapping" if isinstance(batches, (Tensor, Mapping)) else repr(batches)
        raise TypeError(f"batches must be several, such as [batch], got {got}")


def _check_batch(batch: Any) -> None:
    if not isinstance(batch, (Tensor, Mapping, tuple, list)):
        raise TypeError(
            "batches must hold what the model takes, each a tensor, a tuple or list of arguments, "
            f"or a mapping of keyword arguments, got {batch!r}"
        )


def _add_up_ranks(totals: list[Tensor]) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        return
    for total in totals:
        own = total.cuda() if dist.get_backend() == "nccl" else total  # it knows only cards
        dist.all_reduce(own)
        total.copy_(own)


def layers_to_calibrate(model: nn.Module) -> dict[AdaptedLayer, tuple[str, list[str]]]:
    """Of each layer its name and its active adapters on Hadamard bases; ValueError if there are
    none, or one cannot be calibrated."""
    layers = {}
    adapted = layers_by_name(model)
    with gathered(lam for layer in adapted.values() for lam in layer.randlora_lambda.values()):
        for name, layer in adapted.items():
            if adapters := _to_calibrate(name, layer):
                layers[layer] = name, adapters
    if not layers:
        raise ValueError(
            "model has no active adapter on Hadamard bases; only these can scale their inputs; add "
            'one with basis="hadamard"'
        )
    return layers


def _to_calibrate(name: str, layer: AdaptedLayer) -> list[str]:
    """The layer's active adapters on Hadamard bases; ValueError if one cannot be calibrated."""
    active = [] if layer.disabled else layer.active_adapters
    chosen = [adapter for adapter in active if adapter in layer.randlora_input_scale]
    for adapter in chosen:
        if adapter in layer.merged_adapters:
            raise ValueError(f"adapter {adapter!r} of layer {name!r} is merged; unmerge it first")
        if bool(full_tensor((layer.randlora_lambda[adapter] != 0).any())):
            raise ValueError(
                f"adapter {adapter!r} of layer {name!r} has trained (its lambda is not zero), and "
                "another scale would change what it has learned; calibrate before training"
            )
    return chosen


def _observe(model: nn.Module, batch: Any, sums: Mapping[AdaptedLayer, _Sums]) -> None:
    """Calls the model in eval mode, and adds what its layers take and give to `sums`."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        mask = None
        warn_user("attention_mask is no tensor (batch, tokens), so padding is measured, too")
    with _watched(model, mask, sums):
        arguments = moved_to(model, batch)
        if isinstance(arguments, Mapping):
            model(**arguments)
        elif isinstance(arguments, (tuple, list)):
            model(*arguments)
        else:
            model(arguments)


@contextmanager
def _watched(
    model: nn.Module, mask: Tensor | None, sums: Mapping[AdaptedLayer, _Sums]
) -> Iterator[None]:
    """In eval mode, in which layers add what they take and give to `sums`, but where `mask`
    (batch, tokens) is zero."""

    def add(layer, args, kwargs, y) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        places = x.shape[:-1]
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        if mask is not None and places in (mask.shape, (mask.numel(),)):
            kept = mask.flatten().to(x.device) != 0
            x, y = x[kept], y[kept]
        sums[layer].add(x, y)

    def add_of_expert(layer, x, y, expert) -> None:
        sums[layer].add(x, y, expert)

    experts = [layer for layer in sums if isinstance(layer, AdaptedParameter)]
    with ExitStack() as held:
        held.enter_context(torch.compiler.set_stance("force_eager"))
        if experts:  # a mode slows every call of torch
            held.enter_context(ExpertProducts(experts, add_of_expert))
        for module in model.modules():
            held.callback(setattr, module, "training", module.training)
        for layer in sums:
            if isinstance(layer, AdaptedParameter):
                layer.takes_base_weight = True
                held.callback(delattr, layer, "takes_base_weight")
            else:
                held.enter_context(layer.register_forward_hook(add, with_kwargs=True))
        model.eval()
        for module in _of_four_bits(model):
            module.training = True
        yield


def _of_four_bits(model: nn.Module) -> Iterator[nn.Module]:
    """Layers of bitsandbytes that compute the same in both modes, but in eval mode on a CPU change
    the order of their weight, after which they cannot train."""
    bnb = sys.modules.get("bitsandbytes")  # without it nothing can be its layer
    if bnb is not None:
        yield from (m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit))
