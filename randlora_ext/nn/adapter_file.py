"""`save_adapter` and `load_adapter`: from a model to a safetensors file and back, without PEFT."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..basis import Basis, BasisDescription
from ..basis.description import check_kind
from ..files import appear, read_safetensors
from ..ranks import failing_together, full_tensor, is_dtensor
from .adapted_layer import layers_by_path
from .apply import adapted_layers, adapting
from .experts import matching_parameters
from .linear import check_alpha, check_dropout
from .paths import in_base_model
from .state_dict import DIAGONALS, INPUT_SCALE, check_adapter, misfit, refuse

_METADATA = "randlora_adapter"


@dataclass(frozen=True)
class AdapterFile:
    """What a file holds: tensors, and the rest as JSON in its metadata."""

    adapter_name: str
    r: int
    scaling: float
    randlora_dropout: float
    basis: str  # the key of a `BasisDescription`
    # [in_features, out_features, fan_in_fan_out] by the layer's path in the base model; of experts
    # [in_features, out_features, transposed, experts] by the parameter's name.
    layers: dict[str, list]
    # PATH.randlora_lambda (r, n), PATH.randlora_gamma (n, d) and, on Hadamard bases,
    # PATH.randlora_input_scale (in_features,), each with a first dimension `experts` if it has
    # any; and other parameters that were trained.
    tensors: dict[str, Tensor]

    def __post_init__(self) -> None:
        check_alpha("scaling", self.scaling)
        check_dropout(self.randlora_dropout)
        if not self.layers:
            raise ValueError("there are 0 layers")
        for at, its in self.layers.items():
            check_adapter(at, self.tensors, self.basis_of(at), its[3:])

    def basis_of(self, at: str) -> Basis:
        n_in, n_out, *_ = self.layers[at]
        return Basis(n_in, n_out, self.r, **vars(BasisDescription.parse(self.basis)))

    def input_scale_of(self, at: str) -> Tensor | None:
        return self.tensors.get(f"{at}.{INPUT_SCALE}")

    @property
    def others(self) -> dict[str, Tensor]:
        """Parameters outside of adapters."""
        own = {f"{at}.{kind}" for at in self.layers for kind in (*DIAGONALS, INPUT_SCALE)}
        return {name: tensor for name, tensor in self.tensors.items() if name not in own}


def save_adapter(model: nn.Module, path: str | os.PathLike, adapter_name: str = "default") -> None:
    """Writes one adapter of a model of `RandLoraLinear` layers to one safetensors file.

    Parameters outside of adapters that require a gradient, as those of ``modules_to_save``, are
    written, too; buffers are not. The file appears, or replaces an older one, when it is complete.

    Args:
        model: one layer or a model, also wrapped by DistributedDataParallel or torch.compile. If it
            is sharded (FSDP2), all ranks must call, and the first rank writes the file that one
            process would write.
        path: of the file; its folder must exist.
        adapter_name: which adapter; layers without it are left out.

    Raises:
        ValueError: no layer has the adapter, layers differ in its r, scaling, dropout or basis, or
            this process lacks values (meta device, DeepSpeed ZeRO-3).
        OSError: the file cannot be written; an older one stays as it was.
    """
    inner: Any = model.module if isinstance(model, DistributedDataParallel) else model
    adapted = adapted_layers(inner)
    known = {name: at for at, layer in adapted.items() for name in layer.bases}
    check_kind("adapter_name (PEFT's have save_pretrained)", adapter_name, known)
    layers = {at: layer for at, layer in adapted.items() if adapter_name in layer.bases}
    options, *others = (_options(layer, adapter_name) for layer in layers.values())
    if another := next((other for other in others if other != options), None):
        raise ValueError(
            f"adapter {adapter_name!r} has layers of {options} and of {another}; a file holds one "
            "set of options, so give them adapters of other names"
        )
    by_path = layers_by_path(inner)
    own: dict[str, Any] = {
        in_base_model(name, by_path): parameter
        for name, parameter in inner.named_parameters()
        if parameter.requires_grad and not any(f"{kind}." in name for kind in DIAGONALS)
    }
    for at, layer in layers.items():
        own |= {f"{at}.{kind}": getattr(layer, kind)[adapter_name] for kind in DIAGONALS}
        if adapter_name in layer.randlora_input_scale:
            own[f"{at}.{INPUT_SCALE}"] = layer.randlora_input_scale[adapter_name]
    if lost := next((name for name, tensor in own.items() if not _is_here(tensor)), None):
        raise ValueError(f"{lost} has no numbers here (meta device, DeepSpeed ZeRO-3)")
    # Cloned, since safetensors refuses one tensor under two names, those of a tied layer.
    tensors = {name: full_tensor(t.detach()).contiguous().clone() for name, t in own.items()}
    sizes = {at: _sizes(layer) for at, layer in layers.items()}
    said = json.dumps({"adapter_name": adapter_name, **options, "layers": sizes})
    mesh = next((t.device_mesh for t in own.values() if is_dtensor(t)), None)
    with failing_together(mesh):
        if mesh is None or not any(mesh.get_coordinate()):
            with appear(path) as scratch:
                safetensors.torch.save_file(tensors, scratch, {_METADATA: said})


def load_adapter(
    model: nn.Module, path: str | os.PathLike, adapter_name: str | None = None
) -> nn.Module:
    """Puts the adapter of a file on a model, in place; returns the model.

    Linear layers become `RandLoraLinear`, and all else is frozen but the other parameters in the
    file, as by `apply_randlora`. Where the layers have adapters already, this one is added, neither
    active nor trained until ``set_adapter`` names it.

    Args:
        model: the base model, with or without other adapters, before torch.compile, activation
            checkpointing and fully_shard.
        path: of a file that `save_adapter` wrote.
        adapter_name: the adapter's name in the model; None means the name in the file.

    Raises, and leaves the model as it was:
        OSError: the file cannot be read. TypeError: a layer is not a linear layer.
        ValueError: the file is damaged, not of `save_adapter`, or does not fit the model, for
            reasons that the message lists.
    """
    file = read_adapter_file(path)
    name = file.adapter_name if adapter_name is None else adapter_name
    basis = BasisDescription.parse(file.basis)
    options = {"adapter_name": name, "r": file.r, "randlora_dropout": file.randlora_dropout}
    options |= {"basis": basis.kind, "density": basis.density, "seed": basis.seed}
    adapted, parameters = adapted_layers(model), dict(model.named_parameters())
    modules = dict(model.named_modules(remove_duplicate=False))
    is_bare = adapted.keys().isdisjoint(file.layers)
    named = [at for at in file.layers if is_bare and at in parameters]
    found = matching_parameters(model, named)
    stacks = {at: place for at, place in found.items() if at in named}
    targets = {at: modules[at] for at in file.layers if is_bare and at in modules}
    # The model's other adapters use other parameters, too.
    filled = {} if adapted else {at: parameters[at] for at in file.others if at in parameters}
    trained, why = [*filled.values()], " of the adapter"
    with adapting(model, targets, trained, why, stacks, **options) as made:
        misfits = _misfits(file, name, adapted, made, filled)
        refuse(misfits, os.fspath(path), f"the {type(model).__name__}")
        for at in file.layers:
            layer: Any = made.get(at) or adapted[at]
            if name not in layer.bases:
                layer.update_layer(**options)
            layer.scaling[name] = file.scaling
            layer.set_input_scale(name, file.input_scale_of(at))
            filled |= {f"{at}.{kind}": getattr(layer, kind)[name] for kind in DIAGONALS}
        with torch.no_grad():
            for key, parameter in filled.items():
                parameter.copy_(file.tensors[key])
    return model


def read_adapter_file(path: str | os.PathLike) -> AdapterFile:
    """OSError: it cannot be read. ValueError: it is damaged, or no file of `save_adapter`."""
    tensors, metadata = read_safetensors(path)
    try:
        return AdapterFile(**json.loads(metadata[_METADATA]), tensors=tensors)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{path} is no sound file of save_adapter: {reason}; PeftModel.from_pretrained(model, "
            "folder) opens those of PEFT"
        ) from error


def _misfits(
    file: AdapterFile, name: str, adapted: dict, made: dict, others: dict
) -> Iterator[str]:
    """Why the file does not fit the model's layers, adapted before or just made, and parameters."""
    first: dict[Any, str] = {}
    for at, its in file.layers.items():
        if (layer := made.get(at) or adapted.get(at)) is None:
            yield (
                f"{at}: there is no such module or parameter (load before torch.compile and other "
                "wrappers), or it has no adapter and other layers of the file have one"
            )
            continue
        if at in adapted and name in layer.bases:
            yield f"{at}: it has an adapter {name!r} already; choose another adapter_name"
        if (sizes := _sizes(layer)) != its:
            told = "in_features, out_features, transposed, experts if any, are"
            yield f"{at}: {told} {sizes}, in the file {its}"
        weight = layer._base_weight()
        if is_dtensor(weight) or not _is_here(weight):
            yield f"{at}: its weight is not whole here (fully_shard, meta device, DeepSpeed ZeRO-3)"
        other = first.setdefault(layer, at)
        kinds = [kind for kind in (*DIAGONALS, INPUT_SCALE) if f"{at}.{kind}" in file.tensors]
        pair = ([file.tensors[f"{path}.{kind}"] for kind in kinds] for path in (at, other))
        if at != other and not all(map(torch.equal, *pair)):
            yield f"{at}: it is tied to {other}, whose tensors differ in the file"
    for key, tensor in file.others.items():
        none = f"{key}: there is no such parameter, or the model's other adapters use it, too"
        yield misfit(key, tensor, others[key]) if key in others else none


def _sizes(layer: Any) -> list:
    """As `AdapterFile.layers` has them."""
    transposed = getattr(layer, "transposed", layer.fan_in_fan_out)
    return [layer.in_features, layer.out_features, transposed, *layer.experts]


def _options(layer: Any, adapter_name: str) -> dict[str, Any]:
    return {
        "r": layer.r[adapter_name],
        "scaling": layer.scaling[adapter_name],
        "randlora_dropout": getattr(layer.randlora_dropout[adapter_name], "p", 0.0),
        "basis": layer.bases[adapter_name].description.key(),
    }


def _is_here(tensor: Tensor) -> bool:
    return not tensor.is_meta and tensor.numel() > 0  # ZeRO-3 leaves nothing
