"""A saved adapter, read without its model: what it adds to each weight of a model folder."""

import math
import os
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..basis import Basis
from ..files import read_safetensors
from ..nn.adapter_file import read_adapter_file
from ..nn.adapter_record import FIELDS, RECORD_KEY, check_records, record_of
from ..nn.paths import in_base_model, nesting
from ..nn.state_dict import DIAGONALS, INPUT_SCALE, check_adapter
from ..ops.functional import merged_weight
from . import CliError, told_of
from .checkpoint import Checkpoint, locate, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Of transformers, whose linear layers are Conv1D, except heads, which are not square.
_CONV1D_MODELS = "gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"
# Those that store experts as (in, out).
_TRANSPOSED_EXPERTS = "gpt_oss", "openai_privacy_filter", "aria_text", "llama4_text"

# By the names of parameters of a model folder, W + dW of W for those that an adapter changes, and
# what it replaces others by.
Changes = tuple[dict[str, partial[Tensor]], dict[str, Tensor]]


def _plus_delta(
    basis: Basis,
    lams: Tensor,
    gams: Tensor,
    scales: Tensor | None,
    scaling: float,
    transposed: bool,
    weight: Tensor,
) -> Tensor:
    """W + dW in the dtype and layout of W, (in, out) if that is `transposed`, as Conv1D's is; of
    stacked experts if each has a lambda and a gamma, and an input scale on Hadamard bases."""
    merged = weight.clone()
    each = (t.view(-1, *t.shape[-2:]) for t in (merged, lams, gams))
    for e, (W, lam, gam) in enumerate(zip(*each, strict=True)):
        scale = None if scales is None else scales.view(-1, basis.in_features)[e].float()
        W = W.T if transposed else W
        W.copy_(merged_weight(basis, W, lam, gam, scaling, scale))
    return merged


def read_changes(source: Path, checkpoint: Checkpoint) -> Changes:
    """Reads an adapter as PEFT or `load_adapter` would; CliError if it does not fit the model."""
    if "quantization_config" in checkpoint.config:
        raise CliError(f"{checkpoint.folder} is quantized; its 16 or 32 bit original is needed")
    with told_of(source, (LookupError, OSError, TypeError, ValueError)):
        return (_of_own_file if source.is_file() else _of_peft)(source, checkpoint)


def _of_own_file(file: Path, checkpoint: Checkpoint) -> Changes:
    saved = read_adapter_file(file)
    names = {at: at if its[3:] else f"{at}.weight" for at, its in saved.layers.items()}
    name_in = locate([*names.values()], checkpoint)
    added = {}
    for at, (n_in, n_out, turned, *experts) in saved.layers.items():
        name = name_in(names[at])
        sizes, transposed = _layout(checkpoint, name, experts, turned)
        if sizes != (n_in, n_out):
            raise ValueError(f"{at}: in_features and out_features are {sizes}, not {n_in, n_out}")
        lam, gam = (saved.tensors[f"{at}.{kind}"] for kind in DIAGONALS)
        basis, scale = saved.basis_of(at), saved.input_scale_of(at)
        added[name] = partial(_plus_delta, basis, lam, gam, scale, saved.scaling, transposed)
    return added, {name_in(name): tensor for name, tensor in saved.others.items()}


def _of_peft(folder: Path, checkpoint: Checkpoint) -> Changes:
    config, tensors = _read_peft(folder)
    from ..peft.bases import BASIS_NAMES, PackedBufferDict, largest, layer_basis, new_bases

    # PEFT up to 0.21.2 saves them again under every layer.
    held = [key for key in tensors if key.endswith(BASIS_NAMES)]
    bases: Any = {key.rpartition(".")[2]: tensors.pop(key) for key in held}
    ends = tuple(f".{kind}" for kind in DIAGONALS)
    paths = sorted({key.rpartition(".")[0] for key in tensors if key.endswith(ends)})
    if not paths:
        raise ValueError("it holds no randlora_lambda: it is no RandLoRA adapter")
    stacks = {at: tensors[at + ends[0]].shape[:-2] for at in paths}
    names = {}
    for at in paths:
        path, depth = in_base_model(at, paths), nesting(at, paths)
        names[at] = _parameter(path, depth, config) if stacks[at] else f"{path}.weight"
    name_in = locate([*names.values()], checkpoint)
    layouts = {}
    for at, experts in stacks.items():
        name = names[at] = name_in(names[at])
        turned = None if experts else _checked_fan_in_fan_out(checkpoint, name, config)
        layouts[at] = _layout(checkpoint, name, experts, turned)
    if not (bases and config.save_projection):
        drawn = new_bases(config, *largest(sizes for sizes, _ in layouts.values()))
        bases = zip(BASIS_NAMES, drawn, strict=True)
    # As PEFT does, in the dtype of the weights.
    packed = PackedBufferDict(bases).to(checkpoint.parameters[names[paths[0]]].dtype)
    A, B = (packed[name] for name in BASIS_NAMES)
    added = {}
    for at, (sizes, transposed) in layouts.items():
        basis = layer_basis(A, B, *sizes, config.r)
        check_adapter(at, tensors, basis, stacks[at])
        lam, gam = (tensors.pop(f"{at}{end}") for end in ends)
        scale = tensors.pop(f"{at}.{INPUT_SCALE}", None)
        scaling = config.randlora_alpha / config.r
        added[names[at]] = partial(_plus_delta, basis, lam, gam, scale, scaling, transposed)
    if alien := next((key for key in tensors if key.rpartition(".")[0] in paths), None):
        raise ValueError(f"it has {alien}, which an adapted layer does not have")
    others = {name_in(in_base_model(key, paths)): each for key, each in tensors.items()}
    for name in checkpoint.parameters.keys() - others.keys():
        whole = [module for module in config.modules_to_save or () if f".{module}." in f".{name}"]
        if whole:
            raise ValueError(f"it lacks {name}, though modules_to_save has {whole[0]!r}")
    return added, others


def _read_peft(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """The configuration, and the tensors by their names in the base model."""
    kind, file = read_json(folder / CONFIG).get("peft_type"), folder / WEIGHTS
    if str(kind).partition(";")[0] != "RANDLORA":  # as config.PEFT_TYPES
        raise CliError(f"{folder / CONFIG}: peft_type must be RANDLORA, got {kind!r}")
    if not file.is_file():
        raise CliError(f"{file} does not exist; open adapter_model.bin in PEFT and save it again")
    from ..peft import RandLoraConfig, enable

    enable()  # so that PEFT reads our fields
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Specified to not save")
        with told_of(folder / CONFIG, Exception):  # whatever PEFT's conversion raises
            config = RandLoraConfig.from_pretrained(os.fspath(folder))
    saved, _ = read_safetensors(file)
    if isinstance(config.projection_prng_key, str):
        record = record_of(**{name: getattr(config, name) for name in FIELDS})
        check_records(saved, record, folder)
    tensors = {key: each for key, each in saved.items() if not key.endswith(RECORD_KEY)}
    return config, {key.removeprefix("base_model.model."): each for key, each in tensors.items()}


def _parameter(path: str, depth: int, config: Any) -> str:
    """The name of the parameter of the module `path` to which a layer of experts belongs. Those of
    one module are nested in the order of ``target_parameters``, the first one innermost; `depth`
    lie around this one."""
    names = ((f"{path}.{t.rpartition('.')[2]}", f".{t}") for t in config.target_parameters or ())
    found = [*dict.fromkeys(name for name, end in names if f".{name}".endswith(end))]
    if depth >= len(found):
        raise ValueError(
            f"{path} has more layers than target_parameters {config.target_parameters}"
        )
    return found[-1 - depth]


def _checked_fan_in_fan_out(checkpoint: Checkpoint, name: str, config: Any) -> bool:
    conv1d = {kind in _CONV1D_MODELS for kind in checkpoint.types}
    is_square = len({*checkpoint.parameters[name].shape}) == 1
    if is_square and True in conv1d and conv1d != {config.fan_in_fan_out}:
        raise ValueError(
            f"{name} may be a Conv1D's or an nn.Linear's, since PEFT saved the fan_in_fan_out of "
            f"one layer only, {config.fan_in_fan_out}; merge by merge_and_unload()"
        )
    return config.fan_in_fan_out


def _layout(
    checkpoint: Checkpoint, name: str, experts: Sequence[int], turned: bool | None
) -> tuple[tuple[int, int], bool]:
    """(in_features, out_features), and whether the checkpoint has the weight as (in, out). `turned`
    is what the adapter says, None if it does not say which way experts lie."""
    dtype, shape, places = checkpoint.parameters[name]
    types = checkpoint.types
    if experts and len(places) == 1 and len(shape) == 3:
        unknown = turned is None and (not types or "auto_map" in checkpoint.config)
        if unknown or "qwen3_vl_moe" in types:  # which transformers may transpose
            raise ValueError(
                "only the model's code says which way its experts lie; merge_and_unload() merges"
            )
        turned = not types.isdisjoint(_TRANSPOSED_EXPERTS) if turned is None else turned
    if dtype is None or len(shape) < 2 or math.prod(shape[:-2]) != math.prod(experts):
        each = f" for each of {experts[0]} experts" if experts else ""
        raise CliError(
            f"{checkpoint.folder}: {name} must be a float64, float32, float16 or bfloat16 matrix"
            f"{each}, and is {shape}"
        )
    rows, columns = shape[-2:]
    # Experts that lie one by one are nn.Linear's.
    return ((rows, columns), True) if turned and len(places) == 1 else ((columns, rows), False)
