"""`save_adapter` and `load_adapter`: from a model to a safetensors file and back, without PEFT.

The file holds ``PATH.randlora_lambda`` and ``PATH.randlora_gamma`` of every layer. Its metadata
"randlora_adapter" is JSON with adapter_name and layers, which maps the path of each layer in the
base model to the fields of `SavedLayer` that are no tensors.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..basis.description import BasisDescription
from ..basis.ternary_basis import TernaryBasis
from ..ranks import failing_together, full_tensor, is_dtensor, laid_out_like
from ..writing import appear
from .apply import apply_randlora, check_is_called, check_not_nested
from .base_layer import check_base_layer, features
from .linear import RandLoraLinear, check_adapter_name
from .state_dict import DIAGONALS

_METADATA = "randlora_adapter"
# Names that torch.compile and activation checkpointing put into the paths of modules.
_WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_checkpoint_wrapped_module)(\.|$)")


@dataclass(frozen=True)
class SavedLayer:
    """The adapter of one layer.

    Attributes:
        fan_in_fan_out: the base weight is stored as (in, out), as in transformers' Conv1D.
        basis: the key of a `BasisDescription`.
        also_at: other paths of a tied layer.
        lam, gam: lambda (r, n) and gamma (n, d).
    """

    in_features: int
    out_features: int
    fan_in_fan_out: bool
    r: int
    scaling: float
    randlora_dropout: float
    basis: str
    also_at: list
    lam: Tensor
    gam: Tensor

    @property
    def features(self) -> tuple[int, int]:
        return self.in_features, self.out_features

    @property
    def description(self) -> BasisDescription:
        return BasisDescription.parse(self.basis)

    def make_basis(self) -> TernaryBasis:
        basis = self.description
        return TernaryBasis(
            *self.features, self.r, density=basis.density, seed=basis.seed, kind=basis.kind
        )

    def options(self) -> dict[str, Any]:
        """Arguments of `RandLoraLinear`."""
        basis = self.description
        return {"r": self.r, "density": basis.density, "projection_prng_key": basis.seed,
                "basis": basis.kind, "randlora_dropout": self.randlora_dropout}  # fmt: skip


def save_adapter(model: nn.Module, path: str | os.PathLike, adapter_name: str = "default") -> None:
    """Writes one adapter of a model of `RandLoraLinear` layers to one safetensors file.

    The file appears, or replaces an older one, when it is complete. Layers without that adapter
    are left out. If parameters are sharded (FSDP2), all ranks must call: the
    first rank of the device mesh writes the file that one process would write.

    Args:
        model: as `apply_randlora` or `load_adapter` return it, or one layer; it may be wrapped by
            DistributedDataParallel or torch.compile.
        path: of the file; its folder must exist.
        adapter_name: which adapter.

    Raises:
        ValueError: no layer has the adapter, or this process lacks its values (meta device,
            DeepSpeed ZeRO-3).
        OSError: the file cannot be written, on all ranks; an older one stays as it was.
    """
    tensors, layers, mesh = {}, {}, None
    for layer, (at, *also_at) in _layers_with(adapter_name, model).items():
        for kind in DIAGONALS:
            parameter, name = getattr(layer, kind)[adapter_name], _tensor_name(at, kind)
            if not _is_here(parameter):
                raise ValueError(
                    f"{name} of adapter {adapter_name!r} has no numbers here: it is "
                    f"{tuple(parameter.shape)} on {parameter.device}"
                )
            if is_dtensor(parameter):
                mesh = parameter.device_mesh
            tensors[name] = full_tensor(parameter.detach()).contiguous()
        layers[at] = {
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "fan_in_fan_out": layer.fan_in_fan_out,
            "r": layer.r[adapter_name],
            "scaling": layer.scaling[adapter_name],
            "randlora_dropout": getattr(layer.randlora_dropout[adapter_name], "p", 0.0),
            "basis": layer.bases[adapter_name].description.key(),  # type: ignore[union-attr]
            "also_at": also_at,
        }
    text = json.dumps({"adapter_name": adapter_name, "layers": layers})
    with failing_together(mesh):
        if mesh is None or not any(mesh.get_coordinate()):
            with appear(path) as scratch:
                save_file(tensors, scratch, {_METADATA: text})


def load_adapter(
    model: nn.Module, path: str | os.PathLike, adapter_name: str | None = None
) -> nn.Module:
    """Puts the adapter of a file on a model, in place; returns the model.

    Linear layers become `RandLoraLinear`, as by `apply_randlora`, and everything else is frozen.
    If the model has RandLoRA layers already, the adapter is added, neither active nor trained until
    ``set_adapter`` names it. If an adapter of that name exists, the file's values go into its
    parameters, so that training can continue with the same optimizer.

    Args:
        model: the base model, with or without adapters. If it is sharded, the adapter must be
            there already, and all ranks must call.
        path: of a file that `save_adapter` wrote.
        adapter_name: the adapter's name in the model; None means the name in the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged or not an adapter, or it does not fit the model: a layer is
            missing or has other sizes; an adapter of that name has another basis, is merged, or is
            on other layers. The message names each misfit.
        TypeError: a layer is not a linear layer.
            After any of these the model is as it was.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    modules = _modules(inner)
    sharded = (p for p in inner.parameters() if is_dtensor(p))
    mesh = getattr(next(sharded, None), "device_mesh", None)
    with failing_together(mesh):
        name_in_file, saved = read_adapter_file(path)
        name = name_in_file if adapter_name is None else adapter_name
        check_adapter_name(name)
        if misfits := list(_misfits(inner, modules, saved, name)):
            raise ValueError(
                f"{os.fspath(path)} does not fit the {type(model).__name__}, which is unchanged:"
                "\n\t" + "\n\t".join(misfits)
            )
    ours = {at for at in modules if isinstance(modules[at], RandLoraLinear)}
    everything = inner.named_modules(remove_duplicate=False)
    inside = {_WRAPPERS.sub("", path): path for path, _ in everything}
    alike: dict[tuple, list[str]] = {}  # paths of layers to be wrapped, by their options
    for at, numbers in saved.items():
        layer: Any = modules[at]
        if at not in ours:
            paths = alike.setdefault(tuple(numbers.options().items()), [])
            paths += [inside[each] for each in (at, *numbers.also_at)]
        elif name not in layer.bases:
            layer.update_layer(name, **numbers.options())
    for options, paths in alike.items():
        pattern = "|".join(map(re.escape, paths))
        apply_randlora(inner, pattern, adapter_name=name, **dict(options))
    modules = _modules(inner)
    for at, numbers in saved.items():
        layer = modules[at]
        if ours and at not in ours:
            layer.set_adapter([])  # an added adapter is not active
        layer.scaling[name] = numbers.scaling
        for kind, tensor in zip(DIAGONALS, (numbers.lam, numbers.gam), strict=True):
            parameter = getattr(layer, kind)[name]
            with torch.no_grad():
                tensor = tensor.to(parameter.device, parameter.dtype)
                parameter.copy_(laid_out_like(tensor, parameter))
    return model


def read_adapter_file(path: str | os.PathLike) -> tuple[str, dict[str, SavedLayer]]:
    """The adapter's name, and its layers by their paths in the base model.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged, or its description is missing or does not fit its tensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_METADATA)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    if text is None:
        raise ValueError(
            f"{path} does not say which bases it belongs to: it has no metadata {_METADATA!r}, "
            "which save_adapter writes"
        )
    try:
        values = json.loads(text)
        name, described = values["adapter_name"], values["layers"]
        layers = {at: _saved_layer(at, each, tensors) for at, each in described.items()}
        if not isinstance(name, str) or not layers:
            raise ValueError(f"adapter_name is {name!r} and there are {len(layers)} layers")
        if tensors:
            raise ValueError(f"tensor {min(tensors)!r} belongs to no layer")
    except RecursionError as error:
        raise ValueError(f"{path}: the JSON of its metadata is nested too deeply") from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is no sound file of save_adapter: {reason}") from error
    return name, layers


def _saved_layer(at: str, said: dict, tensors: dict[str, Tensor]) -> SavedLayer:
    """Checks a layer's description, and takes its tensors out of `tensors`."""
    values = {}
    for each in fields(SavedLayer)[:-2]:
        value, kind = said[each.name], each.type
        kinds = (int, float) if kind is float else (kind,)
        if type(value) not in kinds or (kind is float and not math.isfinite(value)):
            told = "a finite number" if kind is float else f"of type {kind}"
            raise ValueError(f"{each.name} of {at!r} is {value!r}, and must be {told}")
        values[each.name] = value
    lam, gam = (tensors.pop(_tensor_name(at, kind)) for kind in DIAGONALS)
    layer = SavedLayer(**values, lam=lam, gam=gam)
    if not all(isinstance(path, str) for path in layer.also_at):
        raise ValueError(f"also_at of {at!r} is {layer.also_at!r}, and must be a list of paths")
    if not 0 <= layer.randlora_dropout < 1:
        raise ValueError(f"randlora_dropout of {at!r} is {layer.randlora_dropout}, not in [0, 1)")
    layer.make_basis()  # checks the sizes
    check_shapes(at, lam, gam, layer.r, min(layer.features))
    return layer


def check_shapes(at: str, lam: Tensor, gam: Tensor, r: int, d: int) -> None:
    """Raises ValueError unless lambda is (r, n) and gamma (n, d), floating point."""
    shapes = (r, -(-d // r)), (-(-d // r), d)
    if (lam.shape, gam.shape) != shapes or not (
        lam.is_floating_point() and gam.is_floating_point()
    ):
        raise ValueError(
            f"lambda and gamma of {at!r} must be floating point of shapes (r, n) = {shapes[0]} "
            f"and (n, d) = {shapes[1]}, got {lam.dtype} {tuple(lam.shape)} and {gam.dtype} "
            f"{tuple(gam.shape)}"
        )


def _tensor_name(path: str, diagonals: str) -> str:
    return f"{path}.{diagonals}" if path else diagonals  # the model itself may be the layer


def _misfits(
    model: nn.Module, modules: dict[str, nn.Module], saved: dict[str, SavedLayer], name: str
) -> Iterator[str]:
    seen: dict[int, str] = {}
    for at, layer in saved.items():
        module: Any = modules.get(at)
        if module is None:
            yield f"{at}: there is no such module"
            continue
        if (first := seen.setdefault(id(module), at)) != at:
            yield f"{at}: shares its module with {first} here, but not in the file"
        for other in layer.also_at:
            if modules.get(other) is not module:
                yield f"{other}: must be the same module as {at}"
        if isinstance(module, RandLoraLinear):
            sizes = module.in_features, module.out_features
        else:
            argument = f"layer {at!r} of the adapter"
            check_base_layer(module, argument)
            check_is_called(model, at, argument)
            check_not_nested(model, at, argument)
            sizes = features(module)
            if not at:
                yield "the model is the layer itself, which cannot be replaced in place"
        here = [module.weight]
        if sizes != layer.features:
            yield f"{at}: in_features and out_features are {sizes}, in the file {layer.features}"
        if isinstance(module, RandLoraLinear) and name in module.bases:
            own = module.r[name], module.bases[name].description
            if own != (layer.r, layer.description):
                yield (
                    f"{at}: adapter {name!r} has r={own[0]} and basis {own[1] and own[1].key()}, "
                    f"the file r={layer.r} and basis {layer.basis}"
                )
            if name in module.merged_adapters:
                yield f"{at}: adapter {name!r} is merged; unmerge() first"
            here = [getattr(module, diagonals)[name] for diagonals in DIAGONALS]
        if not all(map(_is_here, here)):
            yield f"{at}: its parameters have no numbers here (meta device, DeepSpeed ZeRO-3)"
    in_file = {at for first, layer in saved.items() for at in (first, *layer.also_at)}
    for at, module in modules.items():
        if isinstance(module, RandLoraLinear) and name in module.bases and at not in in_file:
            yield f"{at}: it has an adapter {name!r}, and the file has none for it"


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by their paths in the model without wrappers; a tied layer has several."""
    named = model.named_modules(remove_duplicate=False)
    return {_WRAPPERS.sub("", path): module for path, module in named}


def _layers_with(adapter_name: str, model: nn.Module) -> dict[RandLoraLinear, list[str]]:
    """Layers with their paths."""
    layers: dict[RandLoraLinear, list[str]] = {}
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    for at, module in _modules(inner).items():
        if isinstance(module, RandLoraLinear):
            layers.setdefault(module, []).append(at)
    if not layers:
        raise ValueError(
            f"model must have layers of apply_randlora, and this {type(model).__name__} has none; "
            "a model of PEFT has save_pretrained"
        )
    chosen = {layer: paths for layer, paths in layers.items() if adapter_name in layer.bases}
    if not chosen:
        known = sorted({name for layer in layers for name in layer.bases})
        raise ValueError(f"adapter_name must be one of {known}, got {adapter_name!r}")
    return chosen


def _is_here(parameter: Tensor) -> bool:
    return not parameter.is_meta and parameter.numel() > 0  # ZeRO-3 leaves nothing
