"""`calibrate`: adapters that learn as much and forget a fraction, by the scale of their inputs."""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .nn.adapted_layer import AdaptedLayer
from .nn.apply import adapted_layers
from .nn.experts import AdaptedParameter
from .ranks import full_tensor

EPSILON = 0.1  # in medians of rms: no feature is multiplied by more than 11 times the median's
FEW_TOKENS = 32  # of an expert that saw fewer, the vector is that of all experts


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Any]) -> None:
    """Measures the size of every input feature, and divides the adapters' inputs by it.

    An uncalibrated adapter learns mostly from a few input features that are large at every token
    (docs/how-it-works.md). Call this once, after adding the adapters and before training::

        loader = torch.utils.data.DataLoader(texts, batch_size=8)  # batches as in training
        randlora_ext.calibrate(model, itertools.islice(loader, 4))

    A few hundred tokens of the training data suffice (docs/density.md). Every active adapter on
    Hadamard bases gets the vector ``input_scale`` (in_features,), float32:

        scale = 1 / (rms + 0.1 * rms.median())      rms = x.square().mean(0).sqrt(), x (tokens, in)
        input_scale = scale / scale.square().mean().sqrt()

    From then on the adapter computes ``F.linear(x * input_scale, dW)``. This costs no parameter and
    no time, because the vector is a factor of the bases' signs, and it belongs to the adapter:
    files and state dicts hold it as ``randlora_input_scale``. Called again, it replaces the
    vectors. Of adapters of ``target_parameters`` every expert gets a vector of its own,
    ``input_scale`` (experts, in_features); one that sees fewer than 32 tokens gets that of all.

    Args:
        model: with adapters on Hadamard bases, by `apply_randlora` or PEFT. It runs in eval mode;
            afterwards each module is in its old mode.
        batches: what the model takes: a tensor, a tuple of arguments, or a mapping of keyword
            arguments. These are moved to the device of the model's first parameter. If the
            mapping has an "attention_mask" (batch, tokens), its zeros leave out tokens in layers
            that see as many tokens; experts do not.

    If torch.distributed is initialized, all ranks must call, each with its own batches, equally
    many if FSDP2 has sharded the model: sums over all ranks give all of them equal vectors.

    Raises, and leaves every adapter as it was: TypeError if batches is a single batch; ValueError
    if no active adapter is on Hadamard bases, one has trained (its lambda is not zero) or is
    merged, no batch comes, or inputs hold NaN or infinity. Warns of layers that see no token or
    only zeros, which stay as they are. Experts must multiply by their parameter or a part of it, by
    torch's functions for products (not einsum), as those of transformers do unless
    ``experts_implementation`` is "batched_mm".

    Source: ours. The same statistic serves quantization in AWQ and SmoothQuant; PEFT's EVA and
    CorDA measure activations to initialize LoRA.
    """
    if isinstance(batches, (Tensor, Mapping)):
        raise TypeError(f"batches must be several, such as [batch], got one {type(batches)}")
    layers = layers_to_calibrate(model)
    # Of each layer or expert the sums of squares by feature, and behind them the number of tokens.
    sums = {
        layer: torch.zeros(*layer.experts, layer.in_features + 1, dtype=torch.float64)
        for layer in layers
    }
    count = torch.zeros(1, dtype=torch.float64)
    for batch in batches:  # which may be made by other models, or by this one
        _observe(model, batch, sums)
        count += 1
    _add_up_ranks([count, *sums.values()])
    if not count:
        raise ValueError("batches must hold at least one batch, got none")
    scales = {}
    for layer, (name, adapters) in layers.items():
        rows = sums[layer].view(-1, layer.in_features + 1)
        if not bool(rows.isfinite().all()):
            raise ValueError(f"the inputs of layer {name!r} hold NaN or infinity")
        of_all = rows.sum(0)
        if bool(of_all[:-1].any()):
            enough = (rows[:, -1:] >= FEW_TOKENS) & rows[:, :-1].any(1, keepdim=True)
            used = torch.where(enough, rows, of_all)
            each = [input_scale_of((row[:-1] / row[-1]).sqrt()) for row in used]
            scales[layer] = adapters, torch.stack(each).view(*layer.experts, -1)
        else:
            seen = "only zeros" if of_all[-1] else "no token"
            warnings.warn(f"layer {name!r} saw {seen} and stays as it was", stacklevel=3)
    for layer, (adapters, scale) in scales.items():
        for adapter in adapters:
            layer.set_input_scale(adapter, scale)


def _add_up_ranks(totals: list[Tensor]) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        return
    for total in totals:
        own = total.cuda() if dist.get_backend() == "nccl" else total  # it knows only cards
        dist.all_reduce(own)
        total.copy_(own)


def input_scale_of(rms: Tensor) -> Tensor:
    """As `calibrate` says. If over half of `rms` are zero, the median is that of the others."""
    median = rms.median()
    median = median if median > 0 else rms[rms > 0].median()
    scale = 1 / (rms + EPSILON * median)
    return (scale / scale.square().mean().sqrt()).float()


def layers_to_calibrate(model: nn.Module) -> dict[AdaptedLayer, tuple[str, list[str]]]:
    """Of each layer its name and its active adapters on Hadamard bases; ValueError if there are
    none, or one cannot be calibrated."""
    layers = {}
    for name, layer in adapted_layers(model, AdaptedLayer).items():
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
    lambdas = layer.randlora_lambda
    own = [adapter for adapter in active if adapter in lambdas]
    chosen = [adapter for adapter in own if adapter in layer.randlora_input_scale]
    for adapter in chosen:
        if adapter in layer.merged_adapters:
            raise ValueError(f"adapter {adapter!r} of layer {name!r} is merged; unmerge it first")
        if bool(full_tensor((lambdas[adapter] != 0).any())):
            raise ValueError(
                f"adapter {adapter!r} of layer {name!r} has trained (its lambda is not zero), and "
                "another scale would change what it has learned; calibrate before training"
            )
    return chosen


def _observe(model: nn.Module, batch: Any, sums: Mapping[AdaptedLayer, Tensor]) -> None:
    """Calls the model in eval mode, and adds the inputs of its layers to `sums`."""
    device = next(model.parameters()).device
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None

    def add(layer, args, kwargs) -> None:
        x = (args[0] if args else next(iter(kwargs.values()))).flatten(0, -2)
        if mask is not None and mask.numel() == len(x):
            x = x[mask.flatten().to(x.device) != 0]
        _add_rows(sums[layer], x)

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    with ExitStack() as held:
        held.enter_context(torch.compiler.set_stance("force_eager"))
        if (products := _Products(sums)).sums:  # a mode slows every call of torch
            held.enter_context(products)
        for module in model.modules():
            held.callback(setattr, module, "training", module.training)
        for layer in sums:
            if isinstance(layer, AdaptedParameter):
                layer.takes_base_weight = True
                held.callback(delattr, layer, "takes_base_weight")
            else:
                held.enter_context(layer.register_forward_pre_hook(add, with_kwargs=True))
        model.eval()
        if isinstance(batch, Mapping):
            model(**{name: moved(value) for name, value in batch.items()})
        else:
            model(*map(moved, batch if isinstance(batch, (tuple, list)) else [batch]))


class _Products(TorchFunctionMode):
    """Adds up what experts multiply: the first factor of each product whose second lies in the
    memory of an adapted parameter."""

    def __init__(self, sums: Mapping[AdaptedLayer, Tensor]) -> None:
        super().__init__()
        self.sums = {at: sums[at] for at in sums if isinstance(at, AdaptedParameter)}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if re.search("linear|matmul|mm", getattr(func, "__name__", "")):
            given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            ends = next((t for t in given if not t.is_floating_point()), None)
            is_linear = func is F.linear  # by w (out, in)
            for x, w in pairwise(given[:2] if is_linear else given):
                for layer in self.sums:
                    if _lies_in(w, layer._base_weight()):
                        self._add(layer, x, w.mT if is_linear else w, ends)
        return func(*args, **kwargs)

    def _add(
        self, layer: AdaptedParameter, x: Tensor, w: Tensor, ends: Tensor | None = None
    ) -> None:
        """The product of x (..., in) and w (in, out), or a stack of these."""
        if w.dim() == 3:
            parts: Sequence[Tensor] = [x] * len(w)
            if ends is not None:  # where the rows of each expert end
                parts = x.tensor_split(ends.cpu().long())
            elif x.dim() >= 3 and x.shape[-3] == len(w):
                parts = x.unbind(-3)
            for part, own in zip(parts, w, strict=False):
                self._add(layer, part, own)
            return
        W, sums = layer._base_weight(), self.sums[layer]
        along = W.stride(-2 if layer.transposed else -1)  # the input side
        at = w.data_ptr() - W.data_ptr()
        if w.shape[:-1] == (layer.in_features,) and w.stride(0) == along and at < W.nbytes:
            rows = x.reshape(-1, layer.in_features)
            # Llama 4 gives every expert all tokens, zero where they belong to another.
            _add_rows(sums[at * len(sums) // W.nbytes], rows[(rows != 0).any(1)])


def _lies_in(part: Tensor, whole: Tensor) -> bool:
    try:
        return 0 <= part.data_ptr() - whole.data_ptr() < whole.nbytes
    except RuntimeError:  # of vmap, or sparse
        return False


def _add_rows(to: Tensor, x: Tensor) -> None:
    to[:-1] += x.float().square().sum(0, dtype=torch.float64).cpu()
    to[-1] += len(x)
