"""`save_adapter` and `load_adapter`: from a model to a safetensors file and back, without PEFT."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..basis.basis import Basis
from ..basis.description import BasisDescription
from ..ranks import failing_together, full_tensor, is_dtensor
from ..writing import appear
from .apply import adapt
from .base_layer import check_base_layer, features
from .experts import RandLoraParameter, sizes_of
from .linear import RandLoraLinear, check_adapter_name, check_alpha, check_dropout
from .state_dict import DIAGONALS, INPUT_SCALE, misfit

_METADATA = "randlora_adapter"
# Names that torch.compile and activation checkpointing put into the paths of modules.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")


@dataclass(frozen=True)
class AdapterFile:
    """What a file holds: tensors, and the rest as JSON in its metadata."""

    adapter_name: str
    # r, scaling, randlora_dropout, and basis, the key of a `BasisDescription`.
    options: dict[str, Any]
    # [in_features, out_features, fan_in_fan_out] by the layer's path in the base model; of stacked
    # experts [in_features, out_features, transposed, experts] by the parameter's name.
    layers: dict[str, list]
    # PATH.randlora_lambda (r, n), PATH.randlora_gamma (n, d) and, if calibrated,
    # PATH.randlora_input_scale (in_features,), of a tied layer by its first path alone; of experts
    # (experts, r, n) and (experts, n, d); and other parameters that were trained.
    tensors: dict[str, Tensor]

    def __post_init__(self) -> None:
        check_adapter_name(self.adapter_name)
        check_alpha("scaling", self.options["scaling"])
        check_dropout(self.options["randlora_dropout"])
        for at in self.layers:
            basis = self.basis_of(at)
            if self.is_first(at):
                check_diagonals(at, self.tensors, basis.r, basis.d, self.layers[at][3:])
        if not any(map(self.is_first, self.layers)):
            raise ValueError("there are 0 layers")

    def is_first(self, at: str) -> bool:
        """False for a further path of a tied layer."""
        return any(join(at, kind) in self.tensors for kind in DIAGONALS)

    @property
    def others(self) -> list[str]:
        """Names of the parameters outside of adapters."""
        own = {join(at, kind) for at in self.layers for kind in (*DIAGONALS, INPUT_SCALE)}
        return [name for name in self.tensors if name not in own]

    def basis_of(self, at: str) -> Basis:
        (n_in, n_out, *_), key = self.layers[at], BasisDescription.parse(self.options["basis"])
        scale = self.tensors.get(join(at, INPUT_SCALE))
        return Basis(n_in, n_out, self.options["r"], key.density, key.seed, key.kind, scale)


def save_adapter(model: nn.Module, path: str | os.PathLike, adapter_name: str = "default") -> None:
    """Writes one adapter of a model of `RandLoraLinear` layers to one safetensors file.

    Parameters outside of adapters that require a gradient, as those of ``modules_to_save``, are
    written, too; buffers are not. The file appears, or replaces an older one, when it is complete.
    If parameters are sharded (FSDP2), all ranks must call: the first rank of the mesh writes the
    file that one process would write.

    Args:
        model: one layer or a model, also wrapped by DistributedDataParallel or torch.compile.
        path: of the file; its folder must exist.
        adapter_name: which adapter; layers without it are left out.

    Raises:
        ValueError: no layer has the adapter, or they differ in r, scaling, dropout or basis; this
            process lacks values (meta device, DeepSpeed ZeRO-3).
        OSError: the file cannot be written; an older one stays as it was.
    """
    inner: Any = model.module if isinstance(model, DistributedDataParallel) else model
    adapted = {at: m for at, (_, m) in _modules(inner).items() if isinstance(m, RandLoraLinear)}
    layers = {at: layer for at, layer in adapted.items() if adapter_name in layer.bases}
    if not layers:
        known = sorted({name for layer in adapted.values() for name in layer.bases})
        raise ValueError(
            f"adapter_name must be one of those of apply_randlora, {known}, got {adapter_name!r}; "
            "a model of PEFT has save_pretrained"
        )
    options, *others = (_options(layer, adapter_name) for layer in layers.values())
    if any(other != options for other in others):
        raise ValueError(
            f"adapter {adapter_name!r} has layers of {[options, *others]}; a file holds one set of "
            "options, so give them adapters of other names"
        )
    sizes: dict[str, list] = {}
    for at, m in layers.items():
        stacked = isinstance(m, RandLoraParameter)
        last = [m.transposed, m.experts] if stacked else [m.fan_in_fan_out]
        sizes[at] = [m.in_features, m.out_features, *last]
    said = {"adapter_name": adapter_name, "options": options, "layers": sizes}
    own: dict[str, Tensor] = {n: p for n, p in _parameters(inner).items() if p.requires_grad}
    for layer, at in {layer: at for at, layer in reversed(layers.items())}.items():
        own |= {join(at, kind): getattr(layer, kind)[adapter_name] for kind in DIAGONALS}
        if adapter_name in layer.input_scales:
            own[join(at, INPUT_SCALE)] = layer.input_scales[adapter_name]
    parameters: list[Any] = [*own.values()]
    mesh: Any = next((t.device_mesh for t in parameters if is_dtensor(t)), None)
    tensors = {}
    for name, parameter in own.items():
        if not _is_here(parameter):
            raise ValueError(
                f"{name} has no numbers here: it is {tuple(parameter.shape)} on {parameter.device}"
            )
        tensors[name] = full_tensor(parameter.detach()).contiguous()
    with failing_together(mesh):
        if mesh is None or not any(mesh.get_coordinate()):
            with appear(path) as scratch:
                safetensors.torch.save_file(tensors, scratch, {_METADATA: json.dumps(said)})


def load_adapter(
    model: nn.Module, path: str | os.PathLike, adapter_name: str | None = None
) -> nn.Module:
    """Puts the adapter of a file on a model, in place; returns the model.

    Linear layers become `RandLoraLinear`, and all else is frozen but the other parameters in the
    file, as by `apply_randlora`. Where the layers have adapters already, this one is added, neither
    active nor trained until ``set_adapter`` names it.

    Args:
        model: the base model, with or without other adapters; not sharded yet.
        path: of a file that `save_adapter` wrote.
        adapter_name: the adapter's name in the model; None means the name in the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, not of `save_adapter`, or does not fit the model, for reasons
            that the message lists. TypeError: a layer is not a linear layer.
            After any of these the model is as it was.
    """
    file = read_adapter_file(path)
    name = file.adapter_name if adapter_name is None else adapter_name
    check_adapter_name(name)
    if misfits := list(_misfits(model, file, name)):
        raise ValueError(
            f"{os.fspath(path)} does not fit the {type(model).__name__}, which is unchanged:"
            "\n\t" + "\n\t".join(misfits)
        )
    basis = BasisDescription.parse(file.options["basis"])
    options = {"adapter_name": name, "basis": basis.kind, "density": basis.density}
    options |= {"seed": basis.seed, "r": file.options["r"]}
    options["randlora_dropout"] = file.options["randlora_dropout"]
    modules, parameters = _modules(model), _parameters(model)
    others = {key: parameters[key] for key in file.others}
    if not any(isinstance(modules[at][1], RandLoraLinear) for at in file.layers if at in modules):
        targets = dict(modules[at] for at in file.layers if at in modules)
        pairs = {at: at.rpartition(".")[::2] for at in file.layers if at not in modules}
        stacks = {at: (modules[path][0], own) for at, (path, own) in pairs.items()}
        adapt(model, targets, others.values(), " of the adapter", stacks, **options)
        modules = _modules(model)
    with torch.no_grad():
        for at in filter(file.is_first, file.layers):
            layer: Any = modules[at][1]
            if name not in layer.bases:
                layer.update_layer(**options)
            layer.scaling[name] = file.options["scaling"]
            layer.set_input_scale(name, file.basis_of(at).input_scale)
            for kind in DIAGONALS:
                getattr(layer, kind)[name].copy_(file.tensors[join(at, kind)])
        for key, parameter in others.items():
            parameter.copy_(file.tensors[key])
    return model


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file that another process may replace meanwhile.

    It is opened once; safetensors' own readers open it twice, for the header and for the tensors.
    OSError if it cannot be read, ValueError if it is damaged.
    """
    data = Path(path).read_bytes()
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch lacks
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return tensors, header.get("__metadata__") or {}


def read_adapter_file(path: str | os.PathLike) -> AdapterFile:
    """OSError: it cannot be read. ValueError: it is damaged, or no file of `save_adapter`."""
    of_peft = "PEFT's PeftModel.from_pretrained(model, folder) opens an adapter of PEFT"
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a folder, not a file of save_adapter; {of_peft}")
    tensors, metadata = read_safetensors(path)
    if _METADATA not in metadata:
        raise ValueError(
            f"{path} does not say which bases it belongs to: it has no metadata {_METADATA!r}, "
            f"which save_adapter writes; {of_peft}"
        )
    try:
        return AdapterFile(**json.loads(metadata[_METADATA]), tensors=tensors)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is no sound file of save_adapter: {reason}") from error


def check_diagonals(
    at: str, tensors: Mapping[str, Tensor], r: int, d: int, experts: Sequence[int] = ()
) -> None:
    """KeyError or ValueError unless lambda (*experts, r, n) and gamma (*experts, n, d) are there,
    floating point."""
    n = -(-d // r)
    for kind, shape in zip(DIAGONALS, ((*experts, r, n), (*experts, n, d)), strict=True):
        key = join(at, kind)
        if error := misfit(key, tensors[key], torch.empty(shape, device="meta")):
            raise ValueError(error)


def _misfits(model: nn.Module, file: AdapterFile, name: str) -> Iterator[str]:
    """Why the file does not fit the model as adapter `name`; TypeError for what is no layer."""
    modules, parameters = _modules(model), _parameters(model)
    adapted = {at: m for at, (_, m) in modules.items() if isinstance(m, RandLoraLinear)}
    if taken := [at for at, layer in adapted.items() if name in layer.bases]:
        yield f"{taken[0]}: it has an adapter {name!r} already; choose another adapter_name"
    bare = file.layers.keys() - adapted.keys()
    if bare and bare != file.layers.keys():
        yield f"{min(bare)}: it has no adapter yet, and other layers of the file have one"
    first_paths: dict[nn.Module, str] = {}
    for at, (*sizes, _) in file.layers.items():
        if len(sizes) == 3:
            yield from _stack_misfits(modules, at, file.layers[at])
            continue
        if at not in modules:
            yield f"{at}: there is no such module"
            continue
        module = modules[at][1]
        if (first_paths.setdefault(module, at) == at) != file.is_first(at):
            yield f"{at}: the file and the model differ in whether it is tied to another layer"
        if at in bare:
            check_base_layer(module, f"layer {at!r} of the adapter")
            if not at:
                yield "the model is the layer itself, which cannot be replaced in place"
        if [*features(module)] != sizes:
            yield f"{at}: in_features and out_features are {features(module)}, in the file {sizes}"
        if is_dtensor(module.weight) or not _is_here(module.weight):
            yield f"{at}: its weight is not whole here (fully_shard, meta device, DeepSpeed ZeRO-3)"
    for key in file.others:
        if key not in parameters:
            yield f"{key}: there is no such parameter"
        elif error := misfit(key, file.tensors[key], parameters[key]):
            yield error
        elif adapted:
            yield f"{key}: the model's other adapters use it, too"


def _stack_misfits(modules: Mapping[str, tuple], at: str, saved: list) -> Iterator[str]:
    path, _, own = at.rpartition(".")
    module = modules[at][1].get_base_layer() if at in modules else modules.get(path, [None])[-1]
    if not hasattr(module, own):
        yield f"{at}: there is no such parameter"
        return
    experts, *sizes = sizes_of(module, own)
    if [*sizes, experts] != saved:
        told = "in_features, out_features, transposed and experts are"
        yield f"{at}: {told} {[*sizes, experts]}, in the file {saved}"
    if not _is_here(getattr(module, own)):
        yield f"{at}: it is not whole here (meta device, DeepSpeed ZeRO-3)"


def _options(layer: RandLoraLinear, adapter_name: str) -> dict[str, Any]:
    basis: Any = layer.bases[adapter_name].description
    return {
        "r": layer.r[adapter_name],
        "scaling": layer.scaling[adapter_name],
        "randlora_dropout": getattr(layer.randlora_dropout[adapter_name], "p", 0.0),
        "basis": basis.key(),
    }


def _unwrapped(path: str) -> str:
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def _modules(model: nn.Module) -> dict[str, tuple[str, Any]]:
    """(path, module) by the path without wrappers, of several the innermost; layers of parameters
    by the names of these."""
    named = model.named_modules(remove_duplicate=False)
    return {_name(path, module): (path, module) for path, module in named}


def _name(path: str, module: nn.Module) -> str:
    path = _unwrapped(path)
    if not isinstance(module, RandLoraParameter):
        return path
    return join(path.replace(".base_layer", ""), module.parameter_name)


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those outside of adapters, by their names in the base model."""
    layers = (m for m in model.modules() if isinstance(m, RandLoraLinear))
    adapters = {id(p) for layer in layers for p in layer.adapter_parameters()}
    return {
        re.sub(r"(\.base_layer)+\.", ".", _unwrapped(name)): parameter
        for name, parameter in model.named_parameters()
        if id(parameter) not in adapters
    }


def join(path: str, kind: str) -> str:
    """The name of a layer's tensor; the path is empty if the model itself is the layer."""
    return f"{path}.{kind}" if path else kind


def _is_here(tensor: Tensor) -> bool:
    return not tensor.is_meta and tensor.numel() > 0  # ZeRO-3 leaves nothing
