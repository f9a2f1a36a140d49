"""A saved adapter, read without its model: a PEFT folder or a file of `save_adapter`."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..nn.adapter_format import SavedLayer, check_shapes, read_adapter_file
from ..nn.state_dict import DIAGONALS
from .files import CliError, first_line, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of PEFT's keys
LAMBDA, GAMMA = (f".{name}" for name in DIAGONALS)
BASES = ("randlora_A", "randlora_B")


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

    @property
    def file_bytes(self) -> int:
        return self.file.stat().st_size


def read_adapter(source: Path) -> Adapter:
    """Reads `source`; CliError if it is not a RandLoRA adapter."""
    if not source.is_file():
        return _read_folder(source)
    try:
        plain = read_adapter_file(source)[1]
    except (ValueError, OSError) as error:
        raise CliError(first_line(error)) from error
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
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Specified to not save")
            config = RandLoraConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT raises whatever the conversion of its fields raises
        raise CliError(f"{folder / CONFIG}: {first_line(error)}") from error
    if not file.is_file():
        raise CliError(
            f"{file} does not exist; only safetensors are read, never a pickle such as "
            "adapter_model.bin: open that in PEFT and save it again"
        )
    try:
        saved = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise CliError(f"{file} is damaged or no safetensors file: {first_line(error)}") from error
    if alien := next((key for key in saved if not key.startswith("base_model.")), None):
        raise CliError(f"{file}: tensor {alien!r} must start with {PREFIX!r}")
    tensors = {k: v for k, v in saved.items() if k.rpartition(".")[2] not in BASES}
    diagonals = _diagonals(file, tensors, config.r)
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
    bases = _bases(file, saved, config.r, diagonals)
    return Adapter(folder, file, diagonals, None, config, settings, tensors, bases, others, ignored)


def _diagonals(file: Path, tensors: dict[str, Tensor], r: int) -> dict[str, tuple[Tensor, Tensor]]:
    found = {}
    for key in (key for key in tensors if key.endswith((LAMBDA, GAMMA))):
        path = key.rpartition(".")[0]
        lam, gam = tensors.get(path + LAMBDA), tensors.get(path + GAMMA)
        try:
            if lam is None or gam is None:
                raise ValueError(f"{path} must have both lambda and gamma")
            check_shapes(path, lam, gam, r, gam.shape[-1] if gam.dim() else 0)
        except ValueError as error:
            raise CliError(f"{file}: {error}") from error
        found[path.removeprefix(PREFIX)] = lam, gam
    if not found:
        raise CliError(f"{file} holds no randlora_lambda: it is no RandLoRA adapter")
    return found


def _bases(file: Path, saved: dict[str, Tensor], r: int, diagonals: dict) -> dict[str, Tensor]:
    """The model's bases, else the copies under a layer, which are all that transformers writes."""
    found = {}
    for key in sorted(saved, key=len, reverse=True):
        if (name := key.rpartition(".")[2]) in BASES:
            found[name] = saved[key]  # the shortest key is that of the model
    if not found:
        return {}
    if len(found) == 1:
        raise CliError(f"{file} holds {next(iter(found))} alone; both bases belong together")
    n, d = (max(gam.shape[k] for _, gam in diagonals.values()) for k in (0, 1))
    A, B = (found[name] for name in BASES)
    # Every layer takes its slice from the front.
    sound = A.dim() == B.dim() == 3 and A.shape[1] == 1 and A.shape[0] >= r and A.shape[2] >= d
    sound = sound and all(have >= need for have, need in zip(B.shape, (d, n, r), strict=True))
    if not sound or not (A.is_floating_point() and B.is_floating_point()):
        raise CliError(
            f"{file}: randlora_A {A.dtype} {tuple(A.shape)} or randlora_B {B.dtype} "
            f"{tuple(B.shape)} is too small; they must be floating point of at least "
            f"({r}, 1, {d}) and ({d}, {n}, {r})"
        )
    return found
