"""A saved adapter, read without its model: what it adds to each weight of a model folder."""

import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..basis import Basis
from ..nn.adapter_file import check_diagonals, read_adapter_file, read_safetensors
from ..nn.merging import adapter_dtype
from ..nn.state_dict import DIAGONALS, INPUT_SCALE
from ..ops.functional import merged_weight
from . import CliError, one_line, told_of
from .checkpoint import Checkpoint, locate, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Of transformers, whose linear layers are Conv1D, except heads, which are not square.
_CONV1D_MODELS = "gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"
_PREFIX = "base_model.model."  # of PEFT's keys
_BASES = ("randlora_A", "randlora_B")


class Change(NamedTuple):
    """dW of one layer."""

    basis: Basis
    lam: Tensor
    gam: Tensor
    scaling: float
    transposed: bool  # the model stores the weight as (in, out), as Conv1D does

    def added_to(self, weight: Tensor) -> Tensor:
        """W + dW in the dtype and layout of W."""
        dtype = adapter_dtype(weight.dtype)
        W = weight.T.contiguous() if self.transposed else weight
        lam, gam = self.lam.to(dtype), self.gam.to(dtype)
        total = merged_weight(self.basis, W, lam, gam, self.scaling)
        return total.T if self.transposed else total


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
    name_in, added = locate(saved.layers, checkpoint), {}
    for at, (*features, transposed) in saved.layers.items():
        name = name_in(f"{at}.weight")
        if [*(sizes := _sizes(checkpoint, name, transposed))] != features:
            raise CliError(
                f"{at}: in_features and out_features are {sizes}, in the file {features}"
            )
        lam, gam = (saved.tensors[f"{at}.{kind}"] for kind in DIAGONALS)
        added[name] = Change(saved.basis_of(at), lam, gam, saved.scaling, transposed)
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
    name_in, transposed = locate(paths, checkpoint), config.fan_in_fan_out
    names = {at: name_in(f"{at}.weight") for at in paths}
    sizes = {at: _sizes(checkpoint, name, transposed) for at, name in names.items()}
    types = [part["model_type"] for part in checkpoint.configs() if "model_type" in part]
    conv1d = {kind in _CONV1D_MODELS for kind in types}
    for at in paths:
        check_diagonals(at, tensors, config.r, min(sizes[at]))
        if len({*sizes[at]}) == 1 and True in conv1d and conv1d != {transposed}:
            raise ValueError(
                f"{at}: PEFT saved the fan_in_fan_out of one layer only, {transposed}, and this "
                "square weight may be a Conv1D's or an nn.Linear's; merge by merge_and_unload()"
            )
    dtypes = {at: checkpoint.tensors[name].dtype for at, name in names.items()}
    scaling, added, replaced = config.randlora_alpha / config.r, {}, {}
    for at, basis in _bases_of_peft(config, bases, sizes, dtypes).items():
        lam, gam = (tensors.pop(f"{at}{end}") for end in ends)
        if (scale := tensors.pop(f"{at}.{INPUT_SCALE}", None)) is not None:
            basis = basis.with_input_scale(scale)
        added[names[at]] = Change(basis, lam, gam, scaling, transposed)
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


def _sizes(checkpoint: Checkpoint, name: str, transposed: bool) -> tuple[int, int]:
    """(in_features, out_features)"""
    entry = checkpoint.tensors[name]
    if entry.dtype is None or len(entry.shape) != 2:
        raise CliError(
            f"{entry.file}: {name} must be a float64, float32, float16 or bfloat16 matrix"
        )
    rows, columns = entry.shape
    return (rows, columns) if transposed else (columns, rows)


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
