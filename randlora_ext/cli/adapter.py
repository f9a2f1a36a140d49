"""A saved adapter, read without its model: what it adds to each weight of a model folder."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..basis import Basis
from ..nn.adapter_file import check_diagonals, join, read_adapter_file, read_safetensors
from ..nn.merging import adapter_dtype
from ..nn.state_dict import DIAGONALS, INPUT_SCALE
from ..ops.functional import delta_weight, merged_weight
from . import CliError, one_line, told_of
from .checkpoint import Checkpoint, locate, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Of transformers, whose linear layers are Conv1D, except heads, which are not square.
_CONV1D_MODELS = "gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"
_TRANSPOSED_EXPERTS = "gpt_oss", "openai_privacy_filter"
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
        if weight.dim() == 3:
            each = zip(weight, self.lam, self.gam, strict=True)
            return torch.stack([self._replace(lam=e[1], gam=e[2]).added_to(e[0]) for e in each])
        dtype = adapter_dtype(weight.dtype)
        if self.rows != slice(None):
            delta = delta_weight(self.basis, self.lam.to(dtype), self.gam.to(dtype), self.scaling)
            return (weight.to(dtype) + delta[self.rows]).to(weight.dtype)
        W = weight.T.contiguous() if self.transposed else weight
        lam, gam = self.lam.to(dtype), self.gam.to(dtype)
        total = merged_weight(self.basis, W, lam, gam, self.scaling)
        return total.T if self.transposed else total


class Changes(NamedTuple):
    """What an adapter does to the tensors of a model folder, by their names there."""

    added: dict[str, Change]
    replaced: dict[str, Tensor]


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
    first_paths = [at for at in saved.layers if saved.is_first(at)]
    names = {at: _tensors(at, len(its) > 3, checkpoint) for at, its in saved.layers.items()}
    name_in = locate([names[at][0].format(0) for at in first_paths], checkpoint)
    added: dict[str, Change] = {}
    for at, (*features, transposed) in ((at, its[:3]) for at, its in saved.layers.items()):
        name = name_in(names[at][0])
        if at in first_paths:
            sizes = _sizes(names[at], name_in, checkpoint, transposed)
            if [*sizes] != features:
                raise CliError(
                    f"{at}: in_features and out_features are {sizes}, in the file {features}"
                )
            lam, gam = (saved.tensors[join(at, kind)] for kind in DIAGONALS)
            scaling = saved.options["scaling"]
            change = Change(saved.basis_of(at), lam, gam, scaling, transposed)
            added |= _spread(change, names[at], name_in, checkpoint)
        elif name in checkpoint.tensors:
            raise CliError(f"{name} is a copy of a tied weight; merge by merge_and_unload")
    return Changes(added, {name_in(name): saved.tensors[name] for name in saved.others})


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
    stacks = {at: _parameter(at, config) for at in paths if tensors[at + ends[0]].dim() == 3}
    names = {at: _tensors(stacks.get(at, at), at in stacks, checkpoint) for at in paths}
    name_in = locate(firsts := [its[0].format(0) for its in names.values()], checkpoint)
    types = [part["model_type"] for part in checkpoint.configs() if "model_type" in part]
    conv1d, transposed = {kind in _CONV1D_MODELS for kind in types}, config.fan_in_fan_out
    turned = any(kind in _TRANSPOSED_EXPERTS for kind in types)
    turns = {at: turned if at in stacks else transposed for at in paths}
    sizes = {at: _sizes(names[at], name_in, checkpoint, turns[at]) for at in paths}
    for at in paths:
        experts = tensors[at + ends[0]].shape[:-2]
        check_diagonals(at, tensors, config.r, min(sizes[at]), experts)
        if (
            at not in stacks
            and len({*sizes[at]}) == 1
            and True in conv1d
            and conv1d != {transposed}
        ):
            raise ValueError(
                f"{at}: PEFT saved the fan_in_fan_out of one layer only, {transposed}, and this "
                "square weight may be a Conv1D's or an nn.Linear's; merge by merge_and_unload()"
            )
    pairs = zip(names, firsts, strict=True)
    dtypes = {at: checkpoint.tensors[name_in(name)].dtype for at, name in pairs}
    made = _bases_of_peft(config, _saved_bases(bases), sizes, dtypes)
    scaling = config.randlora_alpha / config.r
    added: dict[str, Change] = {}
    for at in paths:
        lam, gam = (tensors.pop(f"{at}{end}") for end in ends)
        basis = made[at]
        if (scale := tensors.pop(f"{at}.{INPUT_SCALE}", None)) is not None:
            basis = basis.with_input_scale(scale)
        change = Change(basis, lam, gam, scaling, turns[at])
        added |= _spread(change, names[at], name_in, checkpoint)
    replaced = {}
    for key, tensor in tensors.items():
        layer = next((at for at in paths if key.startswith(f"{at}.")), None)
        if layer is not None and not key.startswith(f"{layer}.base_layer."):
            raise ValueError(f"it has {key}, which an adapted layer does not have")
        replaced[name_in(key.replace(".base_layer.", "."))] = tensor
    for name in checkpoint.tensors:
        whole = (module for module in config.modules_to_save or () if f".{module}." in f".{name}")
        if name not in replaced and (module := next(whole, None)):
            raise ValueError(f"it lacks {name}, though modules_to_save has {module!r}")
    return Changes(added, replaced)


def _parameter(at: str, config: Any) -> str:
    """The name of the parameter to which a layer of experts belongs. Those of one module are nested
    in the order of ``target_parameters``, the first one innermost."""
    path, depth = at.replace(".base_layer", ""), at.count(".base_layer")
    names = ((f"{path}.{t.rpartition('.')[2]}", f".{t}") for t in config.target_parameters or ())
    found = [name for name, end in names if f".{name}".endswith(end)]
    if depth >= len(found):
        raise ValueError(f"{at} is no layer of target_parameters {config.target_parameters}")
    return found[-1 - depth]


def _tensors(name: str, stacked: bool, checkpoint: Checkpoint) -> list[str]:
    """The tensors that a layer changes, with "{}" for the number of the expert if files hold them
    one by one, in the names of the adapter."""
    if not stacked:
        return [f"{name}.weight"]
    path, _, own = name.rpartition(".")
    paths = path, path.replace(".mlp.", ".block_sparse_moe.")  # Mixtral's
    forms = [[f"{p}.{{}}.{part}.weight" for part in f] for p in paths for f in _FUSED.get(own, ())]
    for form in ([name], *forms):
        first = form[0].format(0)
        if any(t.endswith(first) or first.endswith(t) for t in checkpoint.tensors):
            return form
    raise CliError(f"{checkpoint.folder} has no {name}, nor what it is made of; merge_and_unload")


def _sizes(
    names: Sequence[str], name_in: Callable, checkpoint: Checkpoint, transposed: bool
) -> tuple[int, int]:
    """(in_features, out_features)"""
    entries = {(n := name_in(name.format(0))): checkpoint.tensors[n] for name in names}
    for name, entry in entries.items():
        if entry.dtype is None or len(entry.shape) not in (2, 3):
            raise CliError(
                f"{entry.file}: {name} must be a float64, float32, float16 or bfloat16 matrix"
            )
    columns = entry.shape[-1]
    rows = sum(entry.shape[-2] for entry in entries.values())
    return (rows, columns) if transposed else (columns, rows)


def _spread(
    change: Change, names: Sequence[str], name_in: Callable, checkpoint: Checkpoint
) -> dict[str, Change]:
    """What a layer's change is to each tensor."""
    if "{}" not in names[0]:
        return {name_in(names[0]): change}
    changes = {}
    for e, (lam, gam) in enumerate(zip(change.lam, change.gam, strict=True)):
        start = 0
        for name in (name_in(name.format(e)) for name in names):
            if name not in checkpoint.tensors:
                raise CliError(f"{checkpoint.folder} has no tensor {name}")
            rows = slice(start, start + checkpoint.tensors[name].shape[0])
            changes[name] = change._replace(lam=lam, gam=gam, rows=rows)
            start = rows.stop
    return changes


def _saved_bases(saved: Mapping[str, Tensor]) -> list[Tensor] | None:
    """randlora_A (r, 1, d) and randlora_B (D, n, r) of the largest layers, if they are there."""
    # The model's have the shortest keys; transformers writes only copies under a layer.
    keys = sorted(saved, key=len, reverse=True)
    found = {key.rpartition(".")[2]: saved[key] for key in keys}
    return [found[name] for name in _BASES] if found else None


def _bases_of_peft(
    config: Any,
    saved: list[Tensor] | None,
    sizes: Mapping[str, tuple[int, int]],
    dtypes: Mapping[str, Any],
) -> dict[str, Basis]:
    """The basis of each layer: of the saved tensors, or of those that the configuration makes."""
    from ..peft.bases import PackedBufferDict, drawn, generated, largest, layer_basis
    from ..peft.config import description_of

    bases: Any = saved
    if (description := description_of(vars(config))) is not None:
        bases = generated(description, config.r, *largest(sizes.values()))
    elif saved is None:
        bases = drawn(config, *largest(sizes.values()))
    cast: dict[torch.dtype, PackedBufferDict] = {}
    for dtype in set(dtypes.values()):
        held = PackedBufferDict()
        for name, basis in zip(_BASES, bases, strict=True):
            held.add(name, basis, saved is not None)
        cast[dtype] = held.to(dtype)  # as PEFT does, to the dtype of the weights
    made = {}
    for at, size in sizes.items():
        A, B = (cast[dtypes[at]][name] for name in _BASES)
        made[at] = layer_basis(A, B, *size, config.r)
    return made
