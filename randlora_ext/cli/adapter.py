"""A saved adapter, read without its model: what it adds to each weight of a model folder."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..basis import Basis
from ..nn.experts import TRANSPOSED, stacked_weight
from ..nn.saved_adapter import BASIS_NAMES, SavedAdapter, read_adapter
from ..nn.state_dict import DIAGONALS, INPUT_SCALE
from ..ops.functional import merged_weight
from . import CliError, errors_about
from .checkpoint import Checkpoint, locate

# Of transformers, whose linear layers are Conv1D, except heads, which are not square.
_CONV1D_MODELS = "gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"


class Changes(NamedTuple):
    """By the names of parameters of a model folder."""

    added: dict[str, partial[Tensor]]  # W + dW of W
    replaced: dict[str, Tensor]  # what other parameters become
    digest: str  # of the adapter


def read_changes(source: Path, checkpoint: Checkpoint) -> Changes:
    """Reads an adapter as PEFT or `load_adapter` would; CliError if it does not fit the model."""
    if "quantization_config" in checkpoint.config:
        raise CliError(f"{checkpoint.folder} is quantized; its 16 or 32 bit original is needed")
    with errors_about(source, (OSError, TypeError, ValueError)):
        return _changes(read_adapter(source), checkpoint)


class _Layout(NamedTuple):
    """How a checkpoint has the weight of a layer."""

    in_features: int
    out_features: int
    transposed: bool  # whether it, or that of each expert, is (in, out)


def _changes(saved: SavedAdapter, checkpoint: Checkpoint) -> Changes:
    names = saved.names()
    for path in names:
        if not saved.experts(path):
            names[path] += ".weight"
    name_in = locate([*names.values()], checkpoint)
    names = {path: name_in(name) for path, name in names.items()}
    layouts = {path: _layout(saved, path, checkpoint, name) for path, name in names.items()}
    if saved.basis is None:
        dtype = checkpoint.parameters[next(iter(names.values()))].dtype
        sizes = [(layout.in_features, layout.out_features) for layout in layouts.values()]
        basis_of = _bases_of_peft(saved, sizes, dtype)
    else:
        basis_of = partial(Basis, r=saved.r, **vars(saved.basis))
    added = {}
    for path, layout in layouts.items():
        basis = basis_of(layout.in_features, layout.out_features)
        for problem in saved.misfits(path, basis, saved.experts(path)):
            raise ValueError(problem)
        tensors = saved.layers[path]
        lam, gam = (tensors[name] for name in DIAGONALS)
        input_scale = tensors.get(INPUT_SCALE)
        scaling = saved.scaling
        added[names[path]] = partial(
            _plus_delta, basis, lam, gam, input_scale, scaling, layout.transposed
        )
    others = {name_in(name): tensor for name, tensor in saved.others.items()}
    missing = saved.first_missing(checkpoint.parameters, others)
    if missing is not None:
        raise ValueError(missing)
    return Changes(added, others, saved.digest())


def _plus_delta(
    basis: Basis,
    lam: Tensor,
    gam: Tensor,
    input_scale: Tensor | None,
    scaling: float,
    transposed: bool,
    weight: Tensor,
) -> Tensor:
    """W + dW in the dtype and layout of W, which is (in, out) if it is `transposed`, as Conv1D's,
    or stacked experts, if each has a lambda and a gamma."""
    # As a model holds them after loading.
    dtype = torch.promote_types(weight.dtype, torch.float32)
    lam, gam = lam.to(dtype), gam.to(dtype)
    if input_scale is not None:
        input_scale = input_scale.float()
    if lam.dim() == 3:
        stack = weight.view(len(lam), *weight.shape[-2:])
        merged = stacked_weight(stack, basis, lam, gam, input_scale, scaling, transposed)
        return merged.view(weight.shape)
    if transposed:
        weight = weight.T.contiguous()
    merged = merged_weight(basis, weight, lam, gam, scaling, input_scale)
    return merged.T.contiguous() if transposed else merged


def _bases_of_peft(
    saved: SavedAdapter, sizes: Sequence[tuple[int, int]], dtype: torch.dtype | None
) -> Callable[..., Basis]:
    """Makes the basis of a layer of in_features and out_features, from what PEFT has drawn."""
    import peft

    from ..peft.bases import PackedBufferDict, largest, layer_basis, new_bases

    if saved.bases.keys() == set(BASIS_NAMES) and saved.fields["save_projection"]:
        A, B = saved.bases["randlora_A"], saved.bases["randlora_B"]
    else:
        drawn_by = ("projection_prng_key", "sparse", "very_sparse")
        fields = {name: saved.fields[name] for name in drawn_by}
        config = peft.RandLoraConfig(r=saved.r, save_projection=True, **fields)
        A, B = new_bases(config, *largest(sizes))
    # As PEFT does, in the dtype of the weights.
    packed = PackedBufferDict({"A": A, "B": B}).to(dtype)
    return partial(layer_basis, packed["A"], packed["B"], r=saved.r)


def _layout(saved: SavedAdapter, path: str, checkpoint: Checkpoint, name: str) -> _Layout:
    """That of the layer's weight, which the checkpoint calls `name`."""
    experts = saved.experts(path)
    dtype, shape, places = checkpoint.parameters[name]
    if dtype is None or len(shape) < 2 or math.prod(shape[:-2]) != math.prod(experts):
        each = f" for each of {experts[0]} experts" if experts else ""
        raise CliError(
            f"{checkpoint.folder}: {name} must be a float64, float32, float16 or bfloat16 matrix"
            f"{each}, and is {shape}"
        )
    rows, columns = shape[-2:]
    if len(places) > 1:  # experts that lie one by one are nn.Linear's
        transposed = False
    elif rows != columns and saved.sizes(path) in ((rows, columns), (columns, rows)):
        transposed = saved.sizes(path) == (rows, columns)
    elif experts:
        transposed = len(shape) == 3 and _are_transposed(checkpoint)
    else:
        transposed = _checked_fan_in_fan_out(saved, checkpoint, name)
    if transposed:
        return _Layout(rows, columns, True)
    return _Layout(columns, rows, False)


def _checked_fan_in_fan_out(saved: SavedAdapter, checkpoint: Checkpoint, name: str) -> bool:
    fan_in_fan_out = saved.fields["fan_in_fan_out"]
    has_conv1d = any(each in _CONV1D_MODELS for each in checkpoint.types)
    has_linear = any(each not in _CONV1D_MODELS for each in checkpoint.types)
    is_square = len(set(checkpoint.parameters[name].shape)) == 1
    if is_square and has_conv1d and (has_linear or not fan_in_fan_out):
        raise ValueError(
            f"{name} may be a Conv1D's or an nn.Linear's, since PEFT saved the fan_in_fan_out of "
            f"one layer only, {fan_in_fan_out}; merge by merge_and_unload()"
        )
    return fan_in_fan_out


def _are_transposed(checkpoint: Checkpoint) -> bool:
    """Whether the model stores fused experts as (in, out)."""
    types = checkpoint.types
    if not types or "auto_map" in checkpoint.config or "qwen3_vl_moe" in types:
        raise ValueError(
            "only the model's code says which way its experts lie; merge_and_unload() merges"
        )
    return not types.isdisjoint(TRANSPOSED)
