"""A saved adapter, read without its model, and its layers over a skeleton of that model."""

import dataclasses
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..nn.adapter_file import SavedLayer, check_shapes, load_adapter, read_adapter_file
from ..nn.linear import RandLoraLinear
from ..nn.state_dict import DIAGONALS
from . import CliError, one_line
from .checkpoint import Checkpoint, find_base, locate, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAME = "default"  # of the adapter in the models that are made here
PREFIX = "base_model.model."  # of PEFT's keys
LAMBDA, GAMMA = (f".{name}" for name in DIAGONALS)
BASES = ("randlora_A", "randlora_B")


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer; `transposed`: the model stores its weight as (in, out), as Conv1D does."""

    in_features: int
    out_features: int
    dtype: torch.dtype = torch.float32
    transposed: bool = False


@dataclass(frozen=True)
class Adapter:
    """What was saved.

    Attributes:
        source: the folder, or the file of `save_adapter`.
        file: the safetensors file.
        diagonals: (lambda (r, n), gamma (n, d)) by the path of the layer in the base model.
        plain: what a file of `save_adapter` says about each layer; None for a PEFT folder. Only a
            PEFT folder has the attributes below.
        config: the `RandLoraConfig`.
        settings: adapter_config.json as it stands.
        tensors: all but the bases, by PEFT's keys.
        bases: "randlora_A" (r, 1, d) and "randlora_B" (D, n, r) of the largest layers, if saved.
        others: what PEFT loads into the base model (modules_to_save, biases, base layers), by its
            path there.
        ignored: keys that PEFT would not load, since an adapted layer has no such parameter.
    """

    source: Path
    file: Path
    diagonals: Mapping[str, tuple[Tensor, Tensor]]
    plain: Mapping[str, SavedLayer] | None = None
    config: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    bases: Mapping[str, Tensor] = field(default_factory=dict)
    others: Mapping[str, Tensor] = field(default_factory=dict)
    ignored: Sequence[str] = ()


@contextmanager
def told_of(what: object, kinds: Any = Exception):
    """Names the adapter or file in another function's error."""
    try:
        yield
    except kinds as error:
        raise CliError(f"{what}: {one_line(error)}") from error


def read_adapter(source: Path) -> Adapter:
    """Reads `source`; CliError if it is not a RandLoRA adapter."""
    if not source.is_file():
        return _read_folder(source)
    try:
        plain = read_adapter_file(source)[1]
    except (ValueError, OSError) as error:
        raise CliError(one_line(error)) from error
    return Adapter(
        source, source, {at: (layer.lam, layer.gam) for at, layer in plain.items()}, plain
    )


def _read_folder(folder: Path) -> Adapter:
    from ..peft import RandLoraConfig, enable

    needed = "; an adapter has one, see PEFT's save_pretrained"
    settings, file = read_json(folder / CONFIG, needed), folder / WEIGHTS
    if (kind := settings.get("peft_type")) != "RANDLORA":
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
    # The model's bases have the shortest keys; transformers writes only copies under a layer.
    bases = {k.rpartition(".")[2]: saved[k] for k in sorted(saved, key=len, reverse=True)
             if k not in tensors}  # fmt: skip
    if len(bases) == 1:
        raise CliError(f"{file} holds {next(iter(bases))} alone; both bases belong together")
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
    return Adapter(folder, file, diagonals, None, config, settings, tensors, bases, others, ignored)


def base_of(adapter: Adapter, base: str | None) -> Checkpoint:
    return find_base(base or (adapter.config and adapter.config.base_model_name_or_path))


def shapes_in_file(adapter: Adapter) -> dict[str, Shape]:
    """Sizes with which bases that are in the file fit, whatever the layers' real D."""
    if adapter.plain:
        return {
            path: Shape(*layer.features, transposed=layer.fan_in_fan_out)
            for path, layer in adapter.plain.items()
        }
    A, B = (adapter.bases[name] for name in BASES)
    sizes = {path: gam.shape[1] for path, (_, gam) in adapter.diagonals.items()}
    if A.dim() != 3 or B.dim() != 3 or min(A.shape[2], B.shape[0]) < max(sizes.values()):
        raise CliError(
            f"{adapter.file}: randlora_A {tuple(A.shape)} or randlora_B {tuple(B.shape)} is too "
            f"small for layers of min(in, out) = {max(sizes.values())}"
        )
    shapes = {path: Shape(d, B.shape[0]) for path, d in sizes.items()}
    if A.shape[2] > max(sizes.values()):  # the largest in and out belong to different layers
        path, d = next(iter(sizes.items()))
        shapes[path] = Shape(A.shape[2], d)
    return shapes


def shapes_in(adapter: Adapter, checkpoint: Checkpoint) -> dict[str, Shape]:
    """The base layers' shapes by path. CliError if the adapter does not fit them."""
    if "quantization_config" in checkpoint.config:
        raise CliError(f"{checkpoint.folder} is quantized; its 16 or 32 bit original is needed")
    name_in = locate(adapter.diagonals, checkpoint)
    shapes = {}
    for path, (_, gam) in adapter.diagonals.items():
        entry = checkpoint.tensors[name_in(f"{path}.weight")]
        if entry.dtype is None or len(entry.shape) != 2:
            raise CliError(
                f"{entry.file}: {path}.weight must be a float64, float32, float16 or bfloat16 "
                "matrix"
            )
        transposed = (adapter.plain[path] if adapter.plain else adapter.config).fan_in_fan_out
        if min(entry.shape) != gam.shape[1]:
            raise CliError(
                f"{path}: the adapter is for min(in, out) = {gam.shape[1]} features, the weight in "
                f"{checkpoint.folder} is {entry.shape}"
            )
        sizes = entry.shape if transposed else entry.shape[::-1]
        shapes[path] = Shape(*sizes, entry.dtype, transposed)
    return shapes


def layers_of(adapter: Adapter, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The adapter's layers over base layers without weights: `RandLoraLinear`, or PEFT's."""
    if adapter.plain:
        model = skeleton(shapes, {at: layer.also_at for at, layer in adapter.plain.items()})
        with told_of(adapter.source, (ValueError, TypeError)):
            load_adapter(model, adapter.source, NAME)
        return {n: m for n, m in model.named_modules() if isinstance(m, RandLoraLinear)}
    from ..peft.layer import layers_with

    return layers_with(peft_model(adapter, adapter.config, shapes, adapter.bases), NAME)


def peft_model(
    adapter: Adapter, config: Any, shapes: Mapping[str, Shape], bases: Mapping[str, Tensor]
) -> Any:
    """A PeftModel over base layers without weights; without `bases` they are made by `config`."""
    import peft

    fields = {"target_modules": "|".join(map(re.escape, shapes)), "save_projection": bool(bases),
              "exclude_modules": None, "modules_to_save": None, "layers_to_transform": None,
              "layers_pattern": None, "bias": "none", "task_type": None}  # fmt: skip
    known = {each.name for each in dataclasses.fields(config)}
    state = {f"base_model.{name}": basis for name, basis in bases.items()}
    for path, pair in adapter.diagonals.items():
        state |= {f"{PREFIX}{path}.{each}": t for each, t in zip(DIAGONALS, pair, strict=True)}
    with told_of(adapter.source), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Specified to not save")
        # The model has no name.
        warnings.filterwarnings("ignore", message=".*base_model_name_or_path. was renamed")
        changed = dataclasses.replace(config, **{k: fields[k] for k in fields.keys() & known})
        model = peft.get_peft_model(skeleton(shapes), changed)
        peft.set_peft_model_state_dict(model, state)
    return model


def skeleton(
    shapes: Mapping[str, Shape], also_at: Mapping[str, Iterable[str]] | None = None
) -> nn.Module:
    """Linear layers at their paths in empty modules, with weights of 0 that take no memory."""
    root = nn.Module()
    for path, shape in shapes.items():
        sizes = shape.in_features, shape.out_features
        with torch.device("meta"):
            if shape.transposed:
                from transformers.pytorch_utils import Conv1D

                layer: Any = Conv1D(*sizes[::-1])
            else:
                layer = nn.Linear(*sizes)
        layer.bias = None
        stored = sizes if shape.transposed else sizes[::-1]
        layer.weight = nn.Parameter(torch.zeros((), dtype=shape.dtype).expand(stored), False)
        for at in (path, *(also_at or {}).get(path, ())):
            *parents, name = at.split(".")
            place = root
            for parent in parents:
                if parent not in place._modules:
                    place.add_module(parent, nn.Module())
                place = place.get_submodule(parent)
            place.add_module(name, layer)
    return root
