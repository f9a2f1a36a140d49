"""What adapted layers take and give, and how the loss changes with what they give."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .batches import moved_to
from .checks import warn_user
from .eval_mode import in_eval_mode, without_cache
from .nn.adapted_layer import AdaptedLayer
from .nn.expert_products import ExpertProducts
from .nn.experts import AdaptedParameter
from .own_text import NO_LABEL
from .ranks import add_up_ranks, world_size


@dataclass
class Sums:
    """Over the tokens that the experts of a layer have seen; a linear layer is one expert. On the
    CPU, in float64."""

    squares: Tensor  # (experts, in_features): of x * x
    values: Tensor  # likewise, of x
    tokens: Tensor  # (experts, 1): how many
    outputs: Tensor  # likewise: of the mean square of each token's outputs
    gradients: Tensor  # (experts, out_features): of the squared gradient of the loss to the outputs

    @classmethod
    def of(cls, layer: AdaptedLayer) -> "Sums":
        widths = layer.in_features, layer.in_features, 1, 1, layer.out_features
        experts = math.prod(layer.experts)
        return cls(*(torch.zeros(experts, width, dtype=torch.float64) for width in widths))

    def add(self, x: Tensor, y: Tensor, expert: int = 0) -> None:
        """Tokens x (tokens, in_features) and what became of them, y (tokens, out_features)."""
        if not len(x):
            return
        x, y = x.float(), y.float()
        self.squares[expert] += x.square().sum(0, dtype=torch.float64).cpu()
        self.values[expert] += x.sum(0, dtype=torch.float64).cpu()
        self.tokens[expert] += len(x)
        self.outputs[expert] += y.square().mean(1).sum(dtype=torch.float64).cpu()

    def add_gradient(self, gradient: Tensor, expert: int = 0) -> None:
        """To the outputs (tokens, out_features) of tokens that `add` counts."""
        squares = gradient.float().square().sum(0, dtype=torch.float64)
        self.gradients[expert] += squares.cpu()


SumsOfLayers = Mapping[AdaptedLayer, Sums]


def add_up(sums: SumsOfLayers) -> None:
    """Gives all ranks the sums over all of them."""
    for of_layer in sums.values():
        for total in vars(of_layer).values():
            add_up_ranks(total)


def average(sums: SumsOfLayers) -> None:
    """Gives all ranks the means over all of them."""
    add_up(sums)
    for of_layer in sums.values():
        for total in vars(of_layer).values():
            total /= world_size()


@torch.no_grad()
def observe(model: nn.Module, batch: Any, sums: SumsOfLayers) -> None:
    """Calls the model in eval mode, and adds what its layers take and give to `sums`, but where
    the mask of `_masks` is zero."""

    def add(layer, args, kwargs, y) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        mask = mask_of(layer, x)
        places = x.shape[:-1]
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        if mask is not None and places in (mask.shape, (mask.numel(),)):
            kept = mask.flatten().to(x.device) != 0
            x, y = x[kept], y[kept]
        sums[layer].add(x, y)

    def add_of_expert(layer, x, y, expert) -> None:
        sums[layer].add(x, y, expert)

    with _masks(model, batch) as mask_of:
        with _plain(model, sums), _hooked(sums, add, add_of_expert):
            _call(model, batch)


@contextmanager
def _masks(model: nn.Module, batch: Any) -> Iterator[Callable[[nn.Module, Tensor], Tensor | None]]:
    """Gives a function of a layer and its inputs: the mask (batch, tokens) of these, if any.

    It is the batch's "attention_mask". In an encoder and decoder that is the encoder's; layers of
    the decoder have `_mask_of_decoder`, unless they read what the encoder gave.
    """
    arguments = batch if isinstance(batch, Mapping) else {}
    mask = arguments.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        mask = None
        warn_user("attention_mask is no tensor (batch, tokens), so padding is measured, too")
    outermost: Any = next(filter(_has_encoder, model.modules()), None)
    if outermost is None:
        yield lambda layer, x: mask
        return
    encoder = outermost.get_encoder()
    of_encoder = set(encoder.modules())
    of_decoder = _mask_of_decoder(arguments, mask)
    encoded: list[Tensor] = []

    def keep(module, args, output) -> None:
        encoded[:] = [output[0]]

    def mask_of(layer: nn.Module, x: Tensor) -> Tensor | None:
        reads_encoder = any(x.data_ptr() == states.data_ptr() for states in encoded)
        return mask if layer in of_encoder or reads_encoder else of_decoder

    with encoder.register_forward_hook(keep):
        yield mask_of


def _has_encoder(module: Any) -> bool:
    has_both = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
    return has_both and callable(getattr(module, "get_encoder", None))


def _mask_of_decoder(arguments: Mapping[str, Any], mask: Tensor | None) -> Tensor | None:
    """Its own, or where labels of tokens count, or the encoder's if it reads the same tokens."""
    own = arguments.get("decoder_attention_mask")
    if own is not None:
        return own
    labels = arguments.get("labels")
    if isinstance(labels, Tensor) and labels.dim() == 2:
        return labels != NO_LABEL
    reads_others = {"decoder_input_ids", "decoder_inputs_embeds"} & arguments.keys()
    return None if reads_others else mask


def differentiate(model: nn.Module, batch: Mapping[str, Tensor], sums: SumsOfLayers) -> bool:
    """Adds to `sums` the gradient of the batch's loss, a sum over its labels, to the layers'
    outputs. False, and adds nothing, if the model gives no loss.

    No gradient of a parameter is computed.
    """
    # DDP would wait for gradients of parameters.
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    with torch.enable_grad(), _plain(inner, sums), _frozen(inner), _gradients_added(sums):
        for module in inner.modules():
            if _checkpoints(module) or _passes_gradients_in_training_alone(module):
                module.training = True
        loss = getattr(_call(inner, batch), "loss", None)
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            return False
        (loss * (batch["labels"] != NO_LABEL).sum()).backward()
    return True


def _checkpoints(module: nn.Module) -> bool:
    """Whether it computes itself again in backward, to save memory, as layers of transformers do in
    training mode alone; False if it would also apply dropout of its own."""
    drops = any(
        "drop" in name and isinstance(value, float) and value > 0
        for name, value in vars(module).items()
    )
    return bool(getattr(module, "gradient_checkpointing", False)) and not drops


def _passes_gradients_in_training_alone(module: nn.Module) -> bool:
    return bool(getattr(module, "SUPPORTS_TRAINING", False))  # of GPTQModel


@contextmanager
def _gradients_added(sums: SumsOfLayers) -> Iterator[None]:
    """Layers called inside it add the gradients to their outputs to `sums`, during backward."""

    def watched(y: Tensor, keep: Callable[[Tensor], None]) -> Tensor:
        if not torch.is_grad_enabled():
            return y
        # The sum with a leaf requires a gradient, whatever y depends on.
        y = y + torch.zeros((), dtype=y.dtype, device=y.device, requires_grad=True)
        y.register_hook(keep)
        return y

    def watch(layer, args, kwargs, y) -> Tensor:
        def keep(gradient: Tensor) -> None:
            sums[layer].add_gradient(gradient.reshape(-1, gradient.shape[-1]))

        return watched(y, keep)

    def add_of_expert(layer, _, gradient, expert) -> None:
        sums[layer].add_gradient(gradient, expert)

    with _hooked(sums, watch, add_of_expert, watched):
        yield


@contextmanager
def _hooked(layers: SumsOfLayers, hook: Any, report: Any, watched: Any = None) -> Iterator[None]:
    """Layers call the forward hook; of experts `report` and `watched` are those of
    `ExpertProducts`."""
    experts = [layer for layer in layers if isinstance(layer, AdaptedParameter)]
    with ExitStack() as held:
        if experts:  # a mode slows every call of torch
            held.enter_context(ExpertProducts(experts, report, watched))
        for layer in layers:
            if not isinstance(layer, AdaptedParameter):
                held.enter_context(layer.register_forward_hook(hook, with_kwargs=True))
        yield


def _call(model: nn.Module, batch: Any) -> Any:
    arguments = moved_to(model, batch)
    if isinstance(arguments, Mapping):
        return model(**arguments)
    if isinstance(arguments, (tuple, list)):
        return model(*arguments)
    return model(arguments)


@contextmanager
def _plain(model: nn.Module, layers: SumsOfLayers) -> Iterator[None]:
    """The model not compiled, in eval mode and without a cache, its experts with their own
    weights."""
    with ExitStack() as held:
        held.enter_context(without_cache(model))
        held.enter_context(torch.compiler.set_stance("force_eager"))
        held.enter_context(in_eval_mode(model))
        for layer in layers:
            if isinstance(layer, AdaptedParameter):
                layer.takes_base_weight = True
                held.callback(delattr, layer, "takes_base_weight")
        yield


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient; afterwards each has the one that it had."""
    trained = {p: p.grad for p in model.parameters() if p.requires_grad}
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, gradient in trained.items():
            parameter.requires_grad_(True)
            parameter.grad = gradient  # FSDP2's copies of parameters go on to require gradients
