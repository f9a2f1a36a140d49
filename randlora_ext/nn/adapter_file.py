"""`save_adapter` and `load_adapter`: from a model to a file and back, without PEFT."""

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..basis.ternary_basis import TernaryBasis
from ..ops.dtensor import full_tensor, is_dtensor, laid_out_like
from .adapter_format import (
    DIAGONALS,
    SavedLayer,
    read_adapter_file,
    tensor_name,
    write_adapter_file,
)
from .apply import apply_randlora, check_is_called, check_not_nested
from .base_layer import check_base_layer, features
from .linear import RandLoraLinear, check_adapter_name

# Names that torch.compile and activation checkpointing put into the paths of modules.
_WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_checkpoint_wrapped_module)(\.|$)")


def save_adapter(model: nn.Module, path: str | os.PathLike, adapter_name: str = "default") -> None:
    """Writes one adapter of a model of `RandLoraLinear` layers to one safetensors file.

    The file appears, or replaces an older one, when it is complete. Layers without that adapter
    are left out. If parameters are sharded (FSDP2, tensor parallelism), all ranks must call: the
    first rank of the device mesh writes the file that one process would write.

    Args:
        model: as `apply_randlora` or `load_adapter` return it, or one layer; it may be wrapped by
            DistributedDataParallel or torch.compile.
        path: of the file; its folder must exist.
        adapter_name: which adapter.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: no layer has the adapter, or this process lacks its values (meta device,
            DeepSpeed ZeRO-3).
        OSError: the file cannot be written, on all ranks; an older one stays as it was.
    """
    saved, mesh = {}, None
    for layer, (at, *also_at) in _layers_with(adapter_name, model).items():
        full: list[Tensor] = []
        for diagonals in DIAGONALS:
            parameter = getattr(layer, diagonals)[adapter_name]
            if not _is_here(parameter):
                raise ValueError(
                    f"{tensor_name(at, diagonals)} of adapter {adapter_name!r} has no numbers "
                    f"here: it is {tuple(parameter.shape)} on {parameter.device}"
                )
            if is_dtensor(parameter):
                mesh = parameter.device_mesh
            full.append(full_tensor(parameter.detach()))
        # The basis of a tensor-parallel layer is a slice.
        basis = layer.bases[adapter_name].description
        assert basis is not None
        sizes = layer.in_features, layer.out_features, layer.r[adapter_name]
        saved[at] = SavedLayer(
            TernaryBasis(*sizes, basis.density, basis.seed, basis.kind),
            layer.scaling[adapter_name],
            getattr(layer.randlora_dropout[adapter_name], "p", 0.0),
            layer.fan_in_fan_out,
            full[0],
            full[1],
            tuple(also_at),
        )
    with _failing_together(mesh):
        if mesh is None or not any(mesh.get_coordinate()):
            write_adapter_file(path, adapter_name, saved)


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
        ImportError: safetensors is not installed.
        OSError: the file cannot be read.
        ValueError: the file is damaged or not an adapter, or it does not fit the model: a layer is
            missing or has other sizes; an adapter of that name has another basis, is merged, or is
            on other layers. The message names each misfit.
        TypeError: a layer is not a linear layer.
            After any of these the model is as it was.
    """
    inner = _without_ddp(model)
    modules = _modules(inner)
    mesh = next((p.device_mesh for p in inner.parameters() if is_dtensor(p)), None)
    with _failing_together(mesh):
        name_in_file, saved = read_adapter_file(path)
        name = name_in_file if adapter_name is None else adapter_name
        check_adapter_name(name)
        if misfits := list(_misfits(inner, modules, saved, name)):
            raise ValueError(
                f"{os.fspath(path)} does not fit the {type(model).__name__}, which is unchanged:"
                "\n\t" + "\n\t".join(misfits)
            )
    ours = {at for at in modules if isinstance(modules[at], RandLoraLinear)}
    for at in saved.keys() & ours:
        layer: Any = modules[at]
        if name not in layer.bases:
            layer.update_layer(name, **_options(saved[at]))
    _wrap(inner, {at: saved[at] for at in saved.keys() - ours}, name)
    modules = _modules(inner)
    for at, numbers in saved.items():
        layer = modules[at]
        if ours and at not in ours:
            layer.set_adapter([])  # an added adapter is not active
        layer.scaling[name] = numbers.scaling
        _copy(numbers.lam, layer.randlora_lambda[name])
        _copy(numbers.gam, layer.randlora_gamma[name])
    return model


def _failing_together(mesh: Any) -> AbstractContextManager:
    if mesh is None:
        return nullcontext()
    from ..distributed.agreement import failing_together  # imports torch.distributed

    return failing_together(mesh)


def _misfits(
    model: nn.Module, modules: dict[str, nn.Module], saved: dict[str, SavedLayer], name: str
) -> Iterator[str]:
    for at, layer in saved.items():
        module: Any = modules.get(at)
        if module is None:
            yield f"{at}: there is no such module"
            continue
        for other in layer.also_at:
            if modules.get(other) is not module:
                yield f"{other}: must be the same module as {at}"
        want: tuple = layer.basis.in_features, layer.basis.out_features
        if isinstance(module, RandLoraLinear):
            sizes = module.in_features, module.out_features
        else:
            check_base_layer(module, f"layer {at!r} of the adapter")
            check_is_called(model, at, f"layer {at!r} of the adapter")
            check_not_nested(model, at, f"layer {at!r} of the adapter")
            sizes = features(module)
            if not at:
                yield "the model is the layer itself, which cannot be replaced in place"
        here = [module.weight]
        if sizes != want:
            yield f"{at}: in_features and out_features are {sizes}, in the file {want}"
        if isinstance(module, RandLoraLinear) and name in module.bases:
            own = module.r[name], module.bases[name].description
            want = layer.basis.r, layer.basis.description
            if own != want:
                yield f"{at}: adapter {name!r} has {_described(*own)}, the file {_described(*want)}"
            if name in module.merged_adapters:
                yield f"{at}: adapter {name!r} is merged; unmerge() first"
            here = [getattr(module, diagonals)[name] for diagonals in DIAGONALS]
        if not all(_is_here(parameter) for parameter in here):
            yield f"{at}: its parameters have no numbers here (meta device, DeepSpeed ZeRO-3)"
    in_file = {at for first, layer in saved.items() for at in (first, *layer.also_at)}
    for at, module in modules.items():
        if isinstance(module, RandLoraLinear) and name in module.bases and at not in in_file:
            yield f"{at}: it has an adapter {name!r}, and the file has none for it"


def _described(r: int, description: Any) -> str:
    return f"r={r} and basis {description.key()}"


def _wrap(model: nn.Module, saved: dict[str, SavedLayer], adapter_name: str) -> None:
    """`apply_randlora` to plain layers, each with its own options."""
    paths: dict[tuple, list[str]] = {}
    inside = {_WRAPPERS.sub("", path): path for path, _ in _named_modules(model)}
    for at, layer in saved.items():
        alike = paths.setdefault(tuple(_options(layer).items()), [])
        alike += [inside[name] for name in (at, *layer.also_at)]
    for options, names in paths.items():
        pattern = "|".join(map(re.escape, names))
        apply_randlora(model, pattern, adapter_name=adapter_name, **dict(options))


def _options(layer: SavedLayer) -> dict[str, Any]:
    return {
        "r": layer.basis.r,
        "density": layer.description.density,
        "projection_prng_key": layer.basis.seed,
        "basis": layer.basis.kind,
        "randlora_dropout": layer.randlora_dropout,
    }


def _without_ddp(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return model.named_modules(remove_duplicate=False)  # a tied layer has several paths


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by their paths in the model without wrappers."""
    return {_WRAPPERS.sub("", path): module for path, module in _named_modules(model)}


def _layers_with(adapter_name: str, model: nn.Module) -> dict[RandLoraLinear, list[str]]:
    """Layers with their paths."""
    layers: dict[RandLoraLinear, list[str]] = {}
    for at, module in _modules(_without_ddp(model)).items():
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


@torch.no_grad()
def _copy(saved: Tensor, parameter: Tensor) -> None:
    parameter.copy_(laid_out_like(saved.to(parameter.device, parameter.dtype), parameter))
