"""Weights that lie in the same memory: merging into one of them changes the others, too."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import warn_user
from ..ranks import local_tensor
from .base_layer import check_writable, first, layer_name


def check_mergeable(layers: Mapping[str, Any]) -> None:
    """Raises, before one of a model's adapted layers is merged, what another's weight forbids."""
    weights: dict[Any, Tensor] = {}
    for path, layer in layers.items():
        layer.path = path
        weight = layer._held_weight()
        if weight is not None and weight.is_meta and hasattr(layer.get_base_layer(), "_hf_hook"):
            continue  # accelerate will bring it
        check_writable(layer)
        if weight is not None:
            weights[layer] = weight
    for one, other in _sharing(weights):
        refuse_shared(one, other)


def refuse_shared(one: Any, other: Any) -> None:
    """Raises RuntimeError, naming both layers, if they share numbers: W can hold one dW."""
    weight, its = one._held_weight(), other._held_weight()
    if one is other or weight is None or its is None or not share_numbers(weight, its):
        return
    raise RuntimeError(
        f"{layer_name(one)} and {layer_name(other)} share one weight, which can hold the change of "
        "one of them only; use them unmerged"
    )


def warn_of_shared(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Warns if a tensor of the model outside of `layers`, which stand or will stand at these paths,
    shares numbers with the weight of one."""
    if "" in layers:  # the model is the layer
        return
    weights = {layer: layer._held_weight() for layer in layers.values()}
    tensors = {layer: weight for layer, weight in weights.items() if weight is not None}
    inside = tuple(f"{path}." for path in layers)
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            if not f"{name}.".startswith(inside):
                tensors[name] = tensor
    told = []
    for one, other in _sharing(tensors):
        if isinstance(one, str) and not isinstance(other, str):
            one, other = other, one
        if isinstance(other, str) and not isinstance(one, str):
            told.append(f"{layer_name(one)} with {other!r}")
    if told:
        warn_user(
            f"adapted layers share weights with modules that have no adapter, {first(told)}: "
            "merging changes these modules, too. Clone the weight of the layer before, or use the "
            "adapter unmerged"
        )


def _sharing(tensors: Mapping[Any, Tensor]) -> Iterator[tuple[Any, Any]]:
    """The pairs of keys whose tensors share numbers."""
    spans = {key: _span(tensor) for key, tensor in tensors.items()}
    before: list[Any] = []  # those that reach as far as the next one begins
    for key in sorted(tensors, key=lambda key: spans[key][0]):
        begin, _ = spans[key]
        before = [other for other in before if spans[other][1] > begin]
        for other in before:
            if share_numbers(tensors[other], tensors[key]):
                yield other, key
        before.append(key)


def share_numbers(one: Tensor, other: Tensor) -> bool:
    """Whether writing into one tensor may change the other: views may begin at different places."""
    if one is other:
        return True
    (begin, end), (its_begin, its_end) = _span(one), _span(other)
    if end <= its_begin or its_end <= begin:
        return False
    one, other = local_tensor(one), local_tensor(other)
    if one.dtype != other.dtype:
        return True
    if one.is_contiguous() and other.is_contiguous():
        return True
    # Of two slices of columns each lies between the rows of the other: mark the numbers of one.
    origin = min(begin, its_begin)
    used = torch.zeros((max(end, its_end) - origin) // one.itemsize, dtype=torch.bool)
    used.as_strided(one.shape, one.stride(), (begin - origin) // one.itemsize).fill_(True)
    at = (its_begin - origin) // one.itemsize
    return bool(used.as_strided(other.shape, other.stride(), at).any())


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses of its first byte and behind its last one; without numbers those of itself."""
    local = local_tensor(tensor)
    try:
        begin = local.data_ptr()
    except RuntimeError:  # of sparse and other special tensors
        begin = 0
    if begin == 0 or local.numel() == 0:
        return id(tensor), id(tensor) + 1
    steps = zip(local.shape, local.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return begin, begin + (last + 1) * local.itemsize
