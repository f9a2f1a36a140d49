"""A saved adapter, read without its model, and what it adds to each weight of a model folder."""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..basis import TernaryBasis
from ..nn.adapter_file import SavedLayer, check_shapes, read_adapter_file
from ..nn.merging import adapter_dtype
from ..nn.state_dict import DIAGONALS
from ..ops.functional import merged_weight
from . import CliError, one_line, told_of
from .checkpoint import Checkpoint, locate, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Of transformers, whose linear layers are Conv1D, except heads, which are not square.
_CONV1D_MODELS = "gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"
PREFIX = "base_model.model."  # of PEFT's keys
LAMBDA, GAMMA = (f".{name}" for name in DIAGONALS)
BASES = ("randlora_A", "randlora_B")


@dataclass(frozen=True)
class Adapter:
    """What was saved.

    Attributes:
        source: the folder, or the file of `save_adapter`.
        diagonals: (lambda (r, n), gamma (n, d)) by the path of the layer in the base model.
        plain: what a file of `save_adapter` says about each layer; None for a PEFT folder. Only a
            PEFT folder has the attributes below.
        config: the `RandLoraConfig`.
        bases: randlora_A (r, 1, d) and randlora_B (D, n, r) of the largest layers, if saved.
        others: what PEFT loads into the base model (modules_to_save, biases, base layers), by the
            name there.
        ignored: keys that PEFT would not load, since an adapted layer has no such parameter.
    """

    source: Path
    diagonals: Mapping[str, tuple[Tensor, Tensor]]
    plain: Mapping[str, SavedLayer] | None = None
    config: Any = None
    bases: tuple[Tensor, Tensor] | None = None
    others: Mapping[str, Tensor] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)

    def is_transposed(self, path: str) -> bool:
        """Whether the model stores the layer's weight as (in, out), as Conv1D does."""
        return (self.plain[path] if self.plain else self.config).fan_in_fan_out


def read_adapter(source: Path) -> Adapter:
    """Reads `source`; CliError if it is not a RandLoRA adapter."""
    if not source.is_file():
        return _read_folder(source)
    try:
        plain = read_adapter_file(source)[1]
    except (ValueError, OSError) as error:
        raise CliError(one_line(error)) from error
    return Adapter(source, {at: (layer.lam, layer.gam) for at, layer in plain.items()}, plain)


def _read_folder(folder: Path) -> Adapter:
    from ..peft import RandLoraConfig, enable
    from ..peft.config import PEFT_TYPES

    needed = "; an adapter has one, see PEFT's save_pretrained"
    settings, file = read_json(folder / CONFIG, needed), folder / WEIGHTS
    if (kind := settings.get("peft_type")) not in PEFT_TYPES:
        raise CliError(f"{folder / CONFIG}: peft_type must be RANDLORA, got {kind!r}")
    enable()  # so that PEFT reads our fields
    # PEFT raises whatever the conversion of its fields raises.
    with told_of(folder / CONFIG), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Specified to not save")
        config = RandLoraConfig.from_pretrained(str(folder))
    if not file.is_file():
        raise CliError(
            f"{file} does not exist; only safetensors are read, never a pickle such as "
            "adapter_model.bin: open that in PEFT and save it again"
        )
    with told_of(
        f"{file} is damaged or no safetensors file", (SafetensorError, OSError, ValueError)
    ):
        saved = load_file(file)
    if alien := next((key for key in saved if not key.startswith("base_model.")), None):
        raise CliError(f"{file}: tensor {alien!r} must start with {PREFIX!r}")
    tensors = {k: v for k, v in saved.items() if k.rpartition(".")[2] not in BASES}
    diagonals = {}
    for path in sorted(k.rpartition(".")[0] for k in tensors if k.endswith((LAMBDA, GAMMA))):
        lam, gam = tensors.get(path + LAMBDA), tensors.get(path + GAMMA)
        if lam is None or gam is None:
            raise CliError(f"{file}: {path} must have both lambda and gamma")
        with told_of(file, ValueError):
            check_shapes(path, lam, gam, config.r, gam.shape[-1] if gam.dim() else 0)
        diagonals[path.removeprefix(PREFIX)] = lam, gam
    if not diagonals:
        raise CliError(f"{file} holds no randlora_lambda: it is no RandLoRA adapter")
    others, ignored = {}, []
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        layer = next((at for at in diagonals if name.startswith(f"{at}.")), "")
        inner = name.removeprefix(f"{layer}.")
        if not layer:
            others[name] = tensor
        elif inner.startswith("base_layer."):
            others[f"{layer}.{inner.removeprefix('base_layer.')}"] = tensor
        elif not name.endswith((LAMBDA, GAMMA)):
            ignored.append(key)
    bases = _saved_bases(file, saved, config.r, max(gam.shape[1] for _, gam in diagonals.values()))
    return Adapter(folder, diagonals, None, config, bases, others, ignored)


def _saved_bases(
    file: Path, saved: Mapping[str, Tensor], r: int, largest: int
) -> tuple[Tensor, Tensor] | None:
    # The model's have the shortest keys; transformers writes only copies under a layer.
    keys = sorted((key for key in saved if key.endswith(BASES)), key=len, reverse=True)
    found = {key.rpartition(".")[2]: saved[key] for key in keys}
    if not found:
        return None
    if len(found) == 1:
        raise CliError(f"{file} holds {next(iter(found))} alone; both bases belong together")
    A, B = (found[name] for name in BASES)
    d, D = A.shape[-1] if A.dim() else 0, B.shape[0] if B.dim() else 0
    fit = A.shape == (r, 1, d) and B.shape == (D, -(-d // r), r) and D >= d >= largest
    if not (fit and A.is_floating_point() and B.is_floating_point()):
        raise CliError(
            f"{file}: randlora_A {A.dtype} {tuple(A.shape)} or randlora_B {B.dtype} "
            f"{tuple(B.shape)} is too small or of another kind; they must be floating point, "
            f"(r, 1, d) and (D, n, r) with r = {r} and D >= d >= {largest}"
        )
    return A, B


# ---- what it adds to the weights -----------------------------------------------------------------


class Shape(NamedTuple):
    """Of a linear layer and its weight."""

    in_features: int
    out_features: int
    dtype: torch.dtype


class Change(NamedTuple):
    """dW of one layer."""

    basis: TernaryBasis
    lam: Tensor
    gam: Tensor
    scaling: float
    transposed: bool  # the model stores the weight as (in, out), as Conv1D does

    def added_to(self, weight: Tensor) -> Tensor:
        """W + dW in the dtype and layout of W."""
        W = weight.T.contiguous() if self.transposed else weight
        total = merged_weight(self.basis, W, self.lam, self.gam, self.scaling)
        return total.T if self.transposed else total


def shapes_in(adapter: Adapter, checkpoint: Checkpoint) -> dict[str, Shape]:
    """The base layers' shapes by path. CliError if the adapter does not fit them."""
    if "quantization_config" in checkpoint.config:
        raise CliError(f"{checkpoint.folder} is quantized; its 16 or 32 bit original is needed")
    name_in = locate(adapter.diagonals, checkpoint)
    conv1d = {kind in _CONV1D_MODELS for kind in _model_types(checkpoint.config)}
    shapes = {}
    for path, (_, gam) in adapter.diagonals.items():
        entry = checkpoint.tensors[name_in(f"{path}.weight")]
        if entry.dtype is None or len(entry.shape) != 2:
            raise CliError(
                f"{entry.file}: {path}.weight must be a float64, float32, float16 or bfloat16 "
                "matrix"
            )
        transposed = adapter.is_transposed(path)
        is_square = entry.shape[0] == entry.shape[1]
        if is_square and not adapter.plain and True in conv1d and conv1d != {transposed}:
            raise CliError(
                f"{path}: PEFT saved the fan_in_fan_out of one layer only, {transposed}, and this "
                "square weight may be a Conv1D's or an nn.Linear's; merge in PEFT, with "
                "merge_and_unload()"
            )
        sizes = entry.shape if transposed else entry.shape[::-1]
        if min(sizes) != gam.shape[1]:
            raise CliError(
                f"{path}: the adapter is for min(in, out) = {gam.shape[1]} features, the weight in "
                f"{checkpoint.folder} is {entry.shape}"
            )
        if adapter.plain and sizes != adapter.plain[path].features:
            raise CliError(
                f"{path}: in_features and out_features are {sizes}, in the file "
                f"{adapter.plain[path].features}"
            )
        shapes[path] = Shape(*sizes, entry.dtype)
    return shapes


def _model_types(config: Mapping[str, Any]) -> Iterator[str]:
    """Of a model and of those it consists of, such as an encoder and a decoder."""
    if "model_type" in config:
        yield config["model_type"]
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _model_types(value)


def changes_of(adapter: Adapter, shapes: Mapping[str, Shape]) -> dict[str, Change]:
    """What the adapter adds to layers of these shapes, by path, as PEFT or `load_adapter` has it.

    CliError if it does not fit them.
    """
    with told_of(adapter.source, ValueError):
        if adapter.plain:
            bases = {path: saved.make_basis() for path, saved in adapter.plain.items()}
            scaling = {path: saved.scaling for path, saved in adapter.plain.items()}
        else:
            bases = _bases_of_peft(adapter, shapes)
            scaling = dict.fromkeys(bases, adapter.config.randlora_alpha / adapter.config.r)
    changes = {}
    for path, (lam, gam) in adapter.diagonals.items():
        dtype = adapter_dtype(shapes[path].dtype)
        diagonals = lam.to(dtype), gam.to(dtype)
        changes[path] = Change(bases[path], *diagonals, scaling[path], adapter.is_transposed(path))
    return changes


def _bases_of_peft(adapter: Adapter, shapes: Mapping[str, Shape]) -> dict[str, TernaryBasis]:
    from ..peft.bases import PackedBufferDict, drawn, generated, largest, layer_basis
    from ..peft.config import description_of

    sizes = ((shape.in_features, shape.out_features) for shape in shapes.values())
    config, description = adapter.config, description_of(vars(adapter.config))
    if description is not None:
        bases = generated(description, config.r, *largest(sizes))
    else:
        bases = adapter.bases or drawn(config, *largest(sizes))
    cast: dict[torch.dtype, PackedBufferDict] = {}
    for dtype in {shape.dtype for shape in shapes.values()}:
        held = PackedBufferDict()
        for name, basis in zip(BASES, bases, strict=True):
            held.add(name, basis, adapter.bases is not None)
        cast[dtype] = held.to(dtype)  # as PEFT does, to the dtype of the weights
    made = {}
    for path, shape in shapes.items():
        A, B = (cast[shape.dtype][name] for name in BASES)
        made[path] = layer_basis(A, B, shape.in_features, shape.out_features, adapter.config.r)
    return made
