"""`save_adapter` and `load_adapter`: from a model to PEFT's folder and back, without PEFT."""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..basis import Basis, BasisDescription
from ..checks import check_adapter_name, check_alpha, check_one_of
from ..files import appear_together
from ..ranks import failing_together, full_tensor, is_dtensor
from .adapted_layer import AdaptedLayer, layers_by_path
from .adapter_config import NEEDS_OURS
from .adapter_record import FIELDS, RECORD_KEY, record_of, record_tensor
from .apply import adapted_layers, adapting
from .experts import matching_parameters
from .linear import RandLoraLinear
from .paths import in_base_model, in_file
from .saved_adapter import CONFIG, PREFIX, WEIGHTS, SavedAdapter, read_adapter
from .state_dict import DIAGONALS, INPUT_SCALE, misfit, refuse

_PARTS = (*DIAGONALS, INPUT_SCALE)
# Modules in PEFT's layers.
_OF_PEFT = ("base_layer", "default", "randlora_A", "randlora_B", "randlora_dropout", *_PARTS)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # never called


def save_adapter(
    model: nn.Module, folder: str | os.PathLike, adapter_name: str = "default"
) -> None:
    """Writes one adapter of a model of `RandLoraLinear` layers into a folder, as PEFT does.

    The folder has adapter_config.json and adapter_model.safetensors, and after
    `randlora_ext.peft.enable` PEFT's ``PeftModel.from_pretrained`` opens it. Parameters outside of
    adapters that require a gradient, as those of ``modules_to_save``, are written, too; buffers are
    not. The files appear, or replace older ones, when they are complete.

    Args:
        model: one layer or a model, also wrapped by DistributedDataParallel or torch.compile. If it
            is sharded (FSDP2), all ranks must call, and the first rank writes the files that one
            process would write.
        folder: is made if it is missing.
        adapter_name: which adapter; layers without it are left out. The folder does not name it.

    Raises:
        TypeError: the model is PEFT's, which has ``save_pretrained``.
        ValueError: no layer has the adapter, layers differ in its r, scaling, dropout or basis, or
            this process lacks values (meta device, DeepSpeed ZeRO-3).
        OSError: the files cannot be written; older ones stay as they were.
    """
    inner: Any = model.module if isinstance(model, DistributedDataParallel) else model
    layers = _layers_with(inner, adapter_name)
    trained = _trained_beside(inner)
    config = _config_of(inner, layers, adapter_name, trained)
    record = record_of(*(config[name] for name in FIELDS))
    stacks = _stacks(layers)
    around = {path: len(its) for path, its in stacks.items()}
    own: dict[str, Any] = {}
    for at, layer in layers.items():
        if layer.experts:
            path = at.rpartition(".")[0]
            place = in_file(path, around) + ".base_layer" * stacks[path].index(at)
        else:
            place = in_file(at, around)
        for part in _PARTS:
            if adapter_name in getattr(layer, part):
                own[f"{place}.{part}"] = getattr(layer, part)[adapter_name]
        sizes = layer.in_features, layer.out_features
        own[f"{place}.{RECORD_KEY}"] = record_tensor(record, *sizes)
    around |= {at: 1 for at, layer in layers.items() if not layer.experts}
    own |= {in_file(name, around): parameter for name, parameter in trained.items()}
    if lost := next((name for name, tensor in own.items() if not _is_here(tensor)), None):
        raise ValueError(f"{lost} has no numbers here (meta device, DeepSpeed ZeRO-3)")
    # Cloned, since safetensors refuses one tensor under two names, those of a tied layer.
    tensors = {
        PREFIX + name.removeprefix("."): full_tensor(tensor.detach()).contiguous().clone()
        for name, tensor in own.items()
    }
    mesh = next((t.device_mesh for t in own.values() if is_dtensor(t)), None)
    with failing_together(mesh):
        if mesh is None or not any(mesh.get_coordinate()):
            with appear_together(folder) as scratch:
                safetensors.torch.save_file(tensors, scratch / WEIGHTS, {"format": "pt"})
                (scratch / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))


def load_adapter(
    model: nn.Module, folder: str | os.PathLike, adapter_name: str = "default"
) -> nn.Module:
    """Puts the adapter of a folder on a model, in place; returns the model.

    Linear layers become `RandLoraLinear`, and all else is frozen but the other parameters in the
    file, as by `apply_randlora`. Where the layers have adapters already, this one is added, neither
    active nor trained until each layer's ``set_adapter`` names it.

    Args:
        model: the base model, with or without other adapters, before torch.compile, activation
            checkpointing and fully_shard.
        folder: of `save_adapter` or of PEFT's ``save_pretrained``, with Hadamard or independent
            bases; those of ``basis="peft"`` only PEFT can draw.
        adapter_name: the adapter's name in the model.

    Raises, and leaves the model as it was:
        OSError: a file cannot be read. TypeError: a layer is not a linear layer, or PEFT's.
        ValueError: the adapter is damaged, on bases that PEFT draws, or does not fit the model, for
            reasons that the message lists.
    """
    saved, place = read_adapter(folder), os.fspath(folder)
    check_adapter_name(adapter_name)
    if saved.basis is None:
        raise ValueError(
            f"{place}: PEFT draws the bases of this adapter; peft.PeftModel.from_pretrained(model, "
            "folder) opens it"
        )
    options = {"adapter_name": adapter_name, "r": saved.r, "randlora_alpha": saved.randlora_alpha}
    options |= {"randlora_dropout": saved.fields["randlora_dropout"]}
    basis = saved.basis
    options |= {"basis": basis.kind, "density": basis.density, "seed": basis.seed}
    by_path, adapted = layers_by_path(model), adapted_layers(model)
    _refuse_peft(by_path.values())
    state = {in_base_model(name, by_path): tensor for name, tensor in _state(model)}
    names = saved.names(state)
    modules = dict(model.named_modules(remove_duplicate=False))
    is_bare = adapted.keys().isdisjoint(names.values())
    named = [at for path, at in names.items() if is_bare and saved.experts(path) and at in state]
    found = matching_parameters(model, named)
    stacks = {at: place for at, place in found.items() if at in named}
    linear = [at for path, at in names.items() if not saved.experts(path)]
    targets = {at: modules[at] for at in linear if is_bare and at in modules}
    # The model's other adapters use other parameters, too.
    others = {} if adapted else {at: state[at] for at in saved.others if at in state}
    trained = [
        tensor
        for at, tensor in others.items()
        if isinstance(tensor, nn.Parameter) and at not in saved.base_weights
    ]
    with adapting(model, targets, trained, " of the adapter", stacks, **options) as made:
        misfits = [*_misfits(saved, adapter_name, names, made, adapted)]
        misfits += _misfits_of_others(saved, others, state)
        refuse(misfits, f"the adapter of {place}", f"the {type(model).__name__}")
        copies = [(others[at], saved.others[at]) for at in others]
        for path, at in names.items():
            layer: Any = made.get(at) or adapted[at]
            if adapter_name not in layer.bases:
                layer.update_layer(**options)
            for part, tensor in saved.layers[path].items():
                if part in _PARTS:
                    copies.append((getattr(layer, part)[adapter_name], tensor))
        with torch.no_grad():
            for own, tensor in copies:
                own.copy_(tensor)
    return model


def _layers_with(model: nn.Module, adapter_name: str) -> dict[str, RandLoraLinear]:
    """The layers that have the adapter, as `adapted_layers` names them."""
    _refuse_peft(layers_by_path(model).values())
    if not (adapted := adapted_layers(model)):
        raise ValueError(
            "model has no adapter: apply_randlora and load_adapter make them, merge_and_unload and "
            "unload take them away; a model of PEFT has save_pretrained"
        )
    known = {name: at for at, layer in adapted.items() for name in layer.bases}
    check_one_of("adapter_name", adapter_name, known)
    return {at: layer for at, layer in adapted.items() if adapter_name in layer.bases}


def _refuse_peft(layers: Iterable[AdaptedLayer]) -> None:
    if any(not isinstance(layer, RandLoraLinear) for layer in layers):
        raise TypeError(
            "model has layers of PEFT, which has save_pretrained(folder), load_adapter(folder, "
            "name) and PeftModel.from_pretrained(model, folder) for the same folders"
        )


def _stacks(layers: Mapping[str, RandLoraLinear]) -> dict[str, list[str]]:
    """Of modules with adapted parameters the names of these, the outermost layer's first."""
    stacks: dict[str, list[str]] = {}
    for at, layer in layers.items():
        if layer.experts:
            stacks.setdefault(at.rpartition(".")[0], []).append(at)
    return stacks


def _trained_beside(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters outside of adapters that require a gradient, by their names in the base model."""
    by_path = layers_by_path(model)
    adapters = {
        parameter
        for layer in by_path.values()
        for part in DIAGONALS
        for parameter in getattr(layer, part).values()
    }
    return {
        in_base_model(name, by_path): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter not in adapters
    }


def _config_of(
    model: nn.Module,
    layers: Mapping[str, RandLoraLinear],
    adapter_name: str,
    trained: Mapping[str, nn.Parameter],
) -> dict[str, Any]:
    """The fields of adapter_config.json. ValueError if layers differ in what it says once."""
    first, *others = (_options(layer, adapter_name) for layer in layers.values())
    if another := next((other for other in others if other != first), None):
        raise ValueError(
            f"adapter {adapter_name!r} has layers of {first} and of {another}; a folder holds one "
            "set of options, so give them adapters of other names"
        )
    basis = BasisDescription.parse(first["basis"])
    modules = _base_modules(model)
    linear = [at for at, layer in layers.items() if not layer.experts]
    kind = _class_of(model)
    of_model = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    name = getattr(model, "name_or_path", None)
    return {
        "auto_mapping": of_model,  # by which PEFT's AutoPeftModel classes find the base model's
        "base_model_name_or_path": name if name and isinstance(name, str) else None,
        "basis": basis.kind,
        "bias": "none",
        "density": basis.density,
        "fan_in_fan_out": any(layers[at].fan_in_fan_out for at in linear),
        "inference_mode": True,
        "modules_to_save": _whole_modules(modules, trained, layers) or None,
        "peft_type": NEEDS_OURS,
        "projection_prng_key": first["basis"],
        "r": first["r"],
        "randlora_alpha": _alpha(first["scaling"], first["r"]),
        "randlora_dropout": first["randlora_dropout"],
        "save_projection": False,
        "target_modules": _target_modules(modules, linear),
        "target_parameters": _target_parameters(model, layers) or None,
        "task_type": None,
    }


def _class_of(model: Any) -> type:
    """Without what torch.compile and fully_shard make of it."""
    kinds = type(getattr(model, "_orig_mod", model)).__mro__
    return next(kind for kind in kinds if not kind.__module__.startswith("torch.distributed."))


def _options(layer: Any, adapter_name: str) -> dict[str, Any]:
    check_alpha("scaling", layer.scaling[adapter_name])
    return {
        "r": layer.r[adapter_name],
        "scaling": layer.scaling[adapter_name],
        "randlora_dropout": getattr(layer.randlora_dropout[adapter_name], "p", 0.0),
        "basis": layer.bases[adapter_name].description.key(),
    }


def _alpha(scaling: float, r: int) -> float:
    """A number whose quotient by r is `scaling`, or the nearest one if no float has it."""
    alpha = float(scaling) * r
    near = (float(round(alpha)), alpha, math.nextafter(alpha, 0), math.nextafter(alpha, 2 * alpha))
    exact = next((each for each in near if each / r == scaling), alpha)
    return int(exact) if exact.is_integer() else exact


def _base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the base model by their paths in it, without those of adapters."""
    by_path, modules = layers_by_path(model), {}
    for path, module in model.named_modules(remove_duplicate=False):
        parts = path.split(".")
        above = (".".join(parts[:depth]) for depth in range(len(parts)))
        of_adapters = (
            layer in by_path and own != "base_layer"
            for layer, own in zip(above, parts, strict=True)
        )
        if not any(of_adapters):
            modules[in_base_model(path, by_path)] = module
    return modules


def _target_modules(modules: Iterable[str], linear: Sequence[str]) -> list[str] | str:
    """What PEFT matches with these modules and no other: their last names, or an expression."""
    names = sorted({at.rpartition(".")[2] for at in linear})
    ends = tuple(f".{name}" for name in names)
    if {at for at in modules if f".{at}".endswith(ends)} == set(linear):
        return names
    return "|".join(re.escape(at) for at in linear)


def _target_parameters(model: nn.Module, layers: Mapping[str, RandLoraLinear]) -> list[str]:
    """What PEFT matches with these parameters and no other: the names of their modules and their
    own, or whole names. Of each module the innermost layer's first, as PEFT nests them."""
    stacks = _stacks(layers)
    whole = [at for its in stacks.values() for at in reversed(its)]
    short = [*dict.fromkeys(".".join(at.split(".")[-2:]) for at in whole)]
    ends = tuple(f".{name}" for name in short)
    by_path = layers_by_path(model)
    known = (in_base_model(name, by_path) for name, _ in model.named_parameters())
    is_exact = {name for name in known if f".{name}".endswith(ends)} == set(whole)
    orders = [[".".join(at.split(".")[-2:]) for at in reversed(its)] for its in stacks.values()]
    in_order = all(order == [name for name in short if name in order] for order in orders)
    return short if is_exact and in_order else whole


def _whole_modules(
    modules: Mapping[str, nn.Module],
    trained: Mapping[str, nn.Parameter],
    layers: Mapping[str, RandLoraLinear],
) -> list[str]:
    """The outermost modules of which everything is trained, which PEFT calls modules_to_save.

    What is trained beside them is saved, too; PEFT then puts it into the base model.
    """
    uses = Counter(
        id(parameter)
        for module in modules.values()
        for parameter in module.parameters(recurse=False)
    )
    found: list[str] = []
    for at, module in modules.items():
        inside = f"{at}."
        if not at or inside.startswith(tuple(f"{name}." for name in found)):
            continue
        if isinstance(module, _CONTAINERS) or any(f"{own}.".startswith(inside) for own in layers):
            continue
        own = {name.removeprefix(inside) for name in trained if name.startswith(inside)}
        is_whole = own and own == {in_base_model(key, ()) for key in module.state_dict()}
        # PEFT trains a copy, which would be tied to nothing.
        if is_whole and all(uses[id(parameter)] == 1 for parameter in module.parameters()):
            found.append(at)
    # PEFT takes every module whose path ends like a name, those of adapters, too.
    others = (*modules, *_OF_PEFT)
    return [at for at in found if not any(o.endswith(at) and o != at for o in others)]


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters, under all their names, and the buffers that a state dict holds."""
    yield from model.named_parameters(remove_duplicate=False)
    for path, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module.named_buffers(path, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def _misfits(
    saved: SavedAdapter,
    adapter_name: str,
    names: Mapping[str, str],
    made: Mapping[str, Any],
    adapted: Mapping[str, Any],
) -> Iterator[str]:
    """Why the adapter does not fit the layers just made or adapted before, by their names in the
    base model; `names` has these by the paths in the file."""
    first: dict[Any, str] = {}
    for path, at in names.items():
        if (layer := made.get(at) or adapted.get(at)) is None:
            yield (
                f"{at}: there is no such module or parameter (load before torch.compile and other "
                "wrappers), or it has no adapter and other layers of the file have one"
            )
            continue
        if at in adapted and adapter_name in layer.bases:
            yield f"{at}: it has an adapter {adapter_name!r} already; choose another adapter_name"
        weight = layer._base_weight()
        if is_dtensor(weight) or not _is_here(weight):
            yield f"{at}: its weight is not whole here (fully_shard, meta device, DeepSpeed ZeRO-3)"
        basis = Basis(layer.in_features, layer.out_features, saved.r, **vars(saved.basis))
        yield from saved.misfits(path, basis, layer.experts)
        other = first.setdefault(layer, path)
        if not saved.have_equal_tensors(path, other):
            yield f"{at}: it is tied to {names[other]}, whose tensors differ in the file"


def _misfits_of_others(
    saved: SavedAdapter, others: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> Iterator[str]:
    for at, tensor in saved.others.items():
        if at in others:
            yield misfit(at, tensor, others[at])
        else:
            yield f"{at}: there is no such parameter, or the model's other adapters use it, too"
    yield saved.first_missing(state, others) or ""


def _is_here(tensor: Tensor) -> bool:
    return not tensor.is_meta and tensor.numel() > 0  # ZeRO-3 leaves nothing
