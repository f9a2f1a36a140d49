"""A saved adapter, read without its model: what it adds to each weight of a model folder."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..basis import Basis
from ..nn.adapter_file import check_diagonals, read_adapter_file, read_safetensors
from ..nn.merging import adapter_dtype
from ..nn.state_dict import DIAGONALS, INPUT_SCALE
from ..ops.functional import delta_weight
from . import CliError, one_line, told_of
from .checkpoint import Checkpoint, locate, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Of transformers, whose linear layers are Conv1D, except heads, which are not square.
_CONV1D_MODELS = "gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"
# Those that store experts as (in, out), and one whose experts transformers may transpose.
_TRANSPOSED_EXPERTS = "gpt_oss", "openai_privacy_filter", "aria_text", "llama4_text"
_TURNED_EXPERTS = "qwen3_vl_moe"
# Of what transformers fuses an expert's parameter when it reads a file: rows below rows.
_FUSED = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
_PREFIX = "base_model.model."  # of PEFT's keys
_BASES = ("randlora_A", "randlora_B")


class Change(NamedTuple):
    """dW of one layer, or of stacked experts with a lambda and a gamma each."""

    basis: Basis
    lam: Tensor
    gam: Tensor
    scaling: float
    transposed: bool  # the model stores the weight as (in, out), as Conv1D does
    rows: slice = slice(None)  # those of dW that the weight has

    def added_to(self, weight: Tensor) -> Tensor:
        """W + dW in the dtype and layout of W."""
        if self.lam.dim() == 3:
            each = zip(weight.view(-1, *weight.shape[-2:]), self.of_experts(), strict=True)
            return torch.stack([change.added_to(W) for W, change in each]).view(weight.shape)
        dtype = adapter_dtype(weight.dtype)
        delta = delta_weight(self.basis, self.lam.to(dtype), self.gam.to(dtype), self.scaling)
        delta = (delta.T if self.transposed else delta)[self.rows]
        return (weight.to(dtype) + delta).to(weight.dtype)

    def of_experts(self) -> Iterator["Change"]:
        """One of each."""
        scales, basis = self.basis.input_scale, self.basis
        for e, (lam, gam) in enumerate(zip(self.lam, self.gam, strict=True)):
            own = basis if scales is None else basis.with_input_scale(scales[e])
            yield self._replace(basis=own, lam=lam, gam=gam)


# Of a layer: its tensor, or those of each expert, whose rows lie below one another.
Places = list[list[str]]
# What an adapter adds to tensors of a model folder, and what it replaces, by their names there.
Changes = tuple[dict[str, Change], dict[str, Tensor]]


def read_changes(source: Path, checkpoint: Checkpoint) -> Changes:
    """Reads an adapter as PEFT or `load_adapter` would; CliError if it does not fit the model."""
    if "quantization_config" in checkpoint.config:
        raise CliError(f"{checkpoint.folder} is quantized; its 16 or 32 bit original is needed")
    if source.is_file():
        return _of_own_file(source, checkpoint)
    with told_of(source / WEIGHTS, (LookupError, OSError, TypeError, ValueError)):
        return _of_peft(source, checkpoint)


def _of_own_file(file: Path, checkpoint: Checkpoint) -> Changes:
    try:
        saved = read_adapter_file(file)
    except (ValueError, OSError) as error:
        raise CliError(one_line(error)) from error
    names = {at: (at, its[3:]) for at, its in saved.layers.items()}
    places, name_in = _places(names, checkpoint)
    added: dict[str, Change] = {}
    for at, (n_in, n_out, transposed, *experts) in saved.layers.items():
        sizes = _sizes(checkpoint, places[at], experts, transposed)
        if sizes != (n_in, n_out):
            raise CliError(
                f"{at}: in_features and out_features are {sizes}, in the file {[n_in, n_out]}"
            )
        lam, gam = (saved.tensors[f"{at}.{kind}"] for kind in DIAGONALS)
        change = Change(saved.basis_of(at), lam, gam, saved.scaling, transposed)
        added |= _spread(change, places[at], checkpoint)
    return added, {name_in(name): tensor for name, tensor in saved.others.items()}


def _of_peft(folder: Path, checkpoint: Checkpoint) -> Changes:
    settings, file = read_json(folder / CONFIG), folder / WEIGHTS
    kind = settings.get("peft_type")
    if not isinstance(kind, str) or kind.partition(";")[0] != "RANDLORA":  # as config.PEFT_TYPES
        raise CliError(f"{folder / CONFIG}: peft_type must be RANDLORA, got {kind!r}")
    if not file.is_file():
        raise CliError(f"{file} does not exist; open adapter_model.bin in PEFT and save it again")
    from ..peft import RandLoraConfig, enable
    from ..peft.config import one_save

    enable()  # so that PEFT reads our fields
    # PEFT raises whatever the conversion of its fields raises.
    with ExitStack() as held:
        with told_of(folder / CONFIG), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Specified to not save")
            shown = held.enter_context(one_save(folder, {}))
            config = RandLoraConfig.from_pretrained(shown)
        saved, _ = read_safetensors(Path(shown, WEIGHTS))
    if alien := next((key for key in saved if not key.startswith("base_model.")), None):
        raise ValueError(f"tensor {alien!r} must start with {_PREFIX!r}")
    bases = {key: saved.pop(key) for key in [*saved] if key.endswith(_BASES)}
    tensors = {key.removeprefix(_PREFIX): tensor for key, tensor in saved.items()}
    ends = tuple(f".{kind}" for kind in DIAGONALS)
    paths = sorted({key.rpartition(".")[0] for key in tensors if key.endswith(ends)})
    if not paths:
        raise ValueError("it holds no randlora_lambda: it is no RandLoRA adapter")
    stacks = {at: tensors[at + ends[0]].shape[:-2] for at in paths}
    names = {at: (_parameter(at, config) if stacks[at] else at, stacks[at]) for at in paths}
    places, name_in = _places(names, checkpoint)
    types, transposed = _types(checkpoint), config.fan_in_fan_out
    conv1d = {kind in _CONV1D_MODELS for kind in types}
    first = {at: checkpoint.tensors[its[0][0]] for at, its in places.items()}
    fused = {at for at in paths if stacks[at] and len(first[at].shape) == 3}
    if fused and (not types or "auto_map" in checkpoint.config):
        raise ValueError("only the model's code says which way its experts lie; merge_and_unload()")
    turned = not {*types}.isdisjoint(_TRANSPOSED_EXPERTS)
    turns = {at: at in fused and turned if stacks[at] else transposed for at in paths}
    sizes = {at: _sizes(checkpoint, places[at], stacks[at], turns[at]) for at in paths}
    for at in paths:
        square = len({*sizes[at]}) == 1 and not stacks[at]
        if square and True in conv1d and conv1d != {transposed}:
            raise ValueError(
                f"{at}: PEFT saved the fan_in_fan_out of one layer only, {transposed}, and this "
                "square weight may be a Conv1D's or an nn.Linear's; merge by merge_and_unload()"
            )
    dtypes = {at: entry.dtype for at, entry in first.items()}
    scaling = config.randlora_alpha / config.r
    added: dict[str, Change] = {}
    replaced = {}
    for at, basis in _bases_of_peft(config, bases, sizes, dtypes).items():
        check_diagonals(at, tensors, basis, stacks[at])
        lam, gam = (tensors.pop(f"{at}{end}") for end in ends)
        if (scale := tensors.pop(f"{at}.{INPUT_SCALE}", None)) is not None:
            basis = basis.with_input_scale(scale, tuple(stacks[at]))
        added |= _spread(Change(basis, lam, gam, scaling, turns[at]), places[at], checkpoint)
    for key, tensor in tensors.items():
        layer = next((at for at in paths if key.startswith(f"{at}.")), None)
        if layer is not None and not key.startswith(f"{layer}.base_layer."):
            raise ValueError(f"it has {key}, which an adapted layer does not have")
        replaced[name_in(key.replace(".base_layer.", "."))] = tensor
    for name in checkpoint.tensors:
        whole = (module for module in config.modules_to_save or () if f".{module}." in f".{name}")
        if name not in replaced and (module := next(whole, None)):
            raise ValueError(f"it lacks {name}, though modules_to_save has {module!r}")
    return added, replaced


def _types(checkpoint: Checkpoint) -> list[str]:
    return [part["model_type"] for part in checkpoint.configs() if "model_type" in part]


def _parameter(at: str, config: Any) -> str:
    """The name of the parameter to which a layer of experts belongs. Those of one module are nested
    in the order of ``target_parameters``, the first one innermost."""
    path, depth = at.replace(".base_layer", ""), at.count(".base_layer")
    names = ((f"{path}.{t.rpartition('.')[2]}", f".{t}") for t in config.target_parameters or ())
    found = [*dict.fromkeys(name for name, end in names if f".{name}".endswith(end))]
    if depth >= len(found):
        raise ValueError(f"{at} is no layer of target_parameters {config.target_parameters}")
    return found[-1 - depth]


def _places(
    names: Mapping[str, tuple[str, Sequence[int]]], checkpoint: Checkpoint
) -> tuple[dict[str, Places], Callable[[str], str]]:
    """The tensors of layers, given by their names and numbers of experts, and `locate`'s answer."""
    here = {at: _named(name, experts, checkpoint) for at, (name, experts) in names.items()}
    name_in = locate((n for its in here.values() for rows in its for n in rows), checkpoint)
    return {at: [[*map(name_in, rows)] for rows in its] for at, its in here.items()}, name_in


def _named(name: str, experts: Sequence[int], checkpoint: Checkpoint) -> Places:
    """As the adapter would call them."""
    if not experts:
        return [[f"{name}.weight"]]
    if _TURNED_EXPERTS in _types(checkpoint):
        raise CliError(f"experts of {_TURNED_EXPERTS} are merged by merge_and_unload() only")
    path, _, own = name.rpartition(".")
    paths = path, path.replace(".mlp.", ".block_sparse_moe.")  # Mixtral's
    forms = [
        [[f"{p}.{e}.{part}.weight" for part in parts] for e in range(*experts)]
        for p in paths
        for parts in _FUSED.get(own, ())
    ]
    for form in ([[name]], *forms):
        first = form[0][0]
        if any(t.endswith(first) or first.endswith(t) for t in checkpoint.tensors):
            return form
    raise CliError(f"{checkpoint.folder} has no {name}, nor what it is made of; merge_and_unload")


def _sizes(
    checkpoint: Checkpoint, places: Places, experts: Sequence[int], transposed: bool
) -> tuple[int, int]:
    """(in_features, out_features)"""
    entries = {name: checkpoint.tensors[name] for name in places[0]}
    for name, entry in entries.items():
        fits = 2 <= len(entry.shape) <= 2 + len(experts)
        fits &= len(places) * math.prod(entry.shape[:-2]) == math.prod(experts)
        if entry.dtype is None or not fits:
            each = f" for each of {experts[0]} experts" if experts else ""
            raise CliError(
                f"{entry.file}: {name} must be a float64, float32, float16 or bfloat16 matrix{each}"
            )
    if experts:  # one more than the adapter has
        path, _, *rest = places[0][0].rsplit(".", 3)
        if (more := ".".join([path, str(*experts), *rest])) in checkpoint.tensors:
            raise CliError(f"{checkpoint.folder} has {more}, and the adapter {experts[0]} experts")
    columns = entry.shape[-1]
    rows = sum(entry.shape[-2] for entry in entries.values())
    return (rows, columns) if transposed else (columns, rows)


def _spread(change: Change, places: Places, checkpoint: Checkpoint) -> dict[str, Change]:
    """What a layer's change is to each tensor."""
    if len(places) == len(places[0]) == 1:
        return {places[0][0]: change}
    changes = {}
    for of_expert, names in zip(change.of_experts(), places, strict=True):
        end = 0
        for name in names:
            rows = slice(end, end := end + checkpoint.tensors[name].shape[0])
            changes[name] = of_expert._replace(rows=rows)
    return changes


def _bases_of_peft(
    config: Any,
    saved: Mapping[str, Tensor],
    sizes: Mapping[str, tuple[int, int]],
    dtypes: Mapping[str, Any],
) -> dict[str, Basis]:
    """The basis of each layer: of the saved tensors, or of those that the configuration makes."""
    from ..peft.bases import PackedBufferDict, drawn, generated, largest, layer_basis
    from ..peft.config import description_of

    # The model's have the shortest keys; transformers writes only copies under a layer.
    keys = sorted(saved, key=len, reverse=True)
    bases: Any = {key.rpartition(".")[2]: saved[key] for key in keys}
    if (description := description_of(vars(config))) is not None:
        bases = zip(_BASES, generated(description, config.r, *largest(sizes.values())), strict=True)
    elif not saved:
        bases = zip(_BASES, drawn(config, *largest(sizes.values())), strict=True)
    bases, cast = dict(bases), {}
    for dtype in set(dtypes.values()):
        held = PackedBufferDict()
        for name in _BASES:
            held.add(name, bases[name], bool(saved))
        cast[dtype] = held.to(dtype)  # as PEFT does, to the dtype of the weights
    return {
        at: layer_basis(*(cast[dtypes[at]][name] for name in _BASES), *size, config.r)
        for at, size in sizes.items()
    }
