"""`save_adapter` and `load_adapter`: from a model to PEFT's folder and back, without PEFT."""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..basis import Basis, BasisDescription
from ..checks import at_most_ten, check_adapter_name, check_alpha, check_one_of, warn_user
from ..files import appear_together
from ..ranks import failing_together, full_tensor, is_dtensor
from .adapted_layer import AdaptedLayer, layers_by_path
from .adapter_config import NEEDS_OURS
from .adapter_record import FIELDS, RECORD_KEY, record_of, record_tensor
from .apply import adapted_layers, matching_modules, prepare_layers, put_in
from .experts import ParameterPlace, matching_parameters
from .linear import RandLoraLinear
from .paths import in_base_model, in_file
from .saved_adapter import CONFIG, PREFIX, WEIGHTS, SavedAdapter, read_adapter
from .state_dict import DIAGONALS, INPUT_SCALE, refuse, tensor_misfits

_PARTS = (*DIAGONALS, INPUT_SCALE)  # of an adapter: attributes of its layers, and names in a file
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
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    layers = _layers_with(inner, adapter_name)
    trained = _trained_beside(inner)
    config = _config_of(inner, layers, adapter_name, trained)
    held = _tensors_to_save(layers, adapter_name, trained, config)
    for path, tensor in held.items():
        if not _is_here(tensor):
            raise ValueError(f"{path} has no numbers here (meta device, DeepSpeed ZeRO-3)")
    # Cloned, since safetensors refuses one tensor under two names, those of a tied layer.
    tensors = {
        PREFIX + path.removeprefix("."): full_tensor(tensor.detach()).contiguous().clone()
        for path, tensor in held.items()
    }
    meshes = [tensor.device_mesh for tensor in held.values() if is_dtensor(tensor)]
    mesh = meshes[0] if meshes else None
    coordinate = None if mesh is None else mesh.get_coordinate()
    is_first_rank = coordinate is None or not any(coordinate)
    with failing_together(mesh):
        if is_first_rank:
            with appear_together(folder) as scratch:
                safetensors.torch.save_file(tensors, scratch / WEIGHTS, {"format": "pt"})
                (scratch / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))


def _tensors_to_save(
    layers: Mapping[str, RandLoraLinear],
    adapter_name: str,
    trained: Mapping[str, nn.Parameter],
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """By their paths in the file; those of FSDP2 as they are, in parts. `layers` and `trained` have
    the names in the base model."""
    record = record_of(*(config[field] for field in FIELDS))
    stacks = _stacks(layers)
    layers_around = {module: len(names) for module, names in stacks.items()}
    held: dict[str, Any] = {}
    for name, layer in layers.items():
        if layer.experts:
            module = name.rpartition(".")[0]
            depth = stacks[module].index(name)
            path = in_file(module, layers_around) + ".base_layer" * depth
        else:
            path = in_file(name, layers_around)
        for part in _PARTS:
            by_adapter = getattr(layer, part)
            if adapter_name in by_adapter:
                held[f"{path}.{part}"] = by_adapter[adapter_name]
        held[f"{path}.{RECORD_KEY}"] = record_tensor(record, layer.in_features, layer.out_features)
    # A trained parameter may lie below a layer, such as its bias.
    layers_around |= {name: 1 for name, layer in layers.items() if not layer.experts}
    for name, parameter in trained.items():
        held[in_file(name, layers_around)] = parameter
    return held


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

    Warns of modules that the adapter's target_modules name and that it holds nothing for, as when
    it was saved from a model of fewer layers.
    """
    saved = read_adapter(folder)
    check_adapter_name(adapter_name)
    options = _layer_options(saved, adapter_name)
    by_path, adapted = layers_by_path(model), adapted_layers(model)
    _refuse_peft(by_path.values())
    state = {in_base_model(path, by_path): tensor for path, tensor in _state(model)}
    names = saved.names(state)
    linear: dict[str, nn.Module] = {}
    parameters: dict[str, ParameterPlace] = {}
    if adapted.keys().isdisjoint(names.values()):  # otherwise layers that exist get the adapter
        linear, parameters = _targets(model, saved, names, state)
    others: dict[str, Tensor] = {}
    if not adapted:  # otherwise other adapters of the model use these parameters, too
        others = {name: state[name] for name in saved.others if name in state}
    trained = [
        tensor
        for name, tensor in others.items()
        if isinstance(tensor, nn.Parameter) and name not in saved.base_weights
    ]
    left_out = _left_out(model, saved, names)
    made = prepare_layers(model, linear, " of the adapter", parameters, **options)
    layers = adapted | made
    misfits = [*_misfits(saved, adapter_name, names, layers, adapted)]
    misfits += _misfits_of_others(saved, others, state)
    refuse(misfits, f"the adapter of {saved.place}", f"the {type(model).__name__}")
    copies = [(others[name], saved.others[name]) for name in others]
    for path, name in names.items():
        layer = layers[name]
        if adapter_name not in layer.bases:
            layer.update_layer(**options)
        for part, tensor in saved.layers[path].items():
            if part in _PARTS:  # not the record
                copies.append((getattr(layer, part)[adapter_name], tensor))
    with torch.no_grad():
        for target, tensor in copies:
            target.copy_(tensor)
    put_in(model, made, trained, adapter_name)
    if left_out:
        warn_user(
            f"the adapter of {saved.place} holds nothing for {len(left_out)} modules of the "
            f"{type(model).__name__} that its target_modules name, too; was it saved from another "
            f"model? These stay as they were: {at_most_ten(left_out)}"
        )
    return model


def _layer_options(saved: SavedAdapter, adapter_name: str) -> dict[str, Any]:
    """The arguments of `RandLoraLinear.update_layer`; ValueError if PEFT draws the bases."""
    basis = saved.basis
    if basis is None:
        raise ValueError(
            f"{saved.place}: PEFT draws the bases of this adapter; "
            "peft.PeftModel.from_pretrained(model, folder) opens it"
        )
    return {
        "adapter_name": adapter_name,
        "r": saved.r,
        "randlora_alpha": saved.randlora_alpha,
        "randlora_dropout": saved.fields["randlora_dropout"],
        "basis": basis.kind,
        "density": basis.density,
        "seed": basis.seed,
    }


def _targets(
    model: nn.Module,
    saved: SavedAdapter,
    names: Mapping[str, str],
    state: Container[str],
) -> tuple[dict[str, nn.Module], dict[str, ParameterPlace]]:
    """The linear layers and the parameters of a model that the adapter adapts, as far as they are
    there, as `prepare_layers` takes them. `names` are those of its layers, by their paths in the
    file."""
    modules = dict(model.named_modules(remove_duplicate=False))
    linear, wanted = {}, []
    for path, name in names.items():
        if saved.experts(path):
            wanted.append(name)
        elif name in modules:
            linear[name] = modules[name]
    known = [name for name in wanted if name in state]
    # Others may end like one of them.
    found = matching_parameters(model, known)
    return linear, {name: place for name, place in found.items() if name in known}


def _left_out(model: nn.Module, saved: SavedAdapter, names: Mapping[str, str]) -> list[str]:
    """The modules that the adapter's configuration names and its tensors do not. `names` are those
    of its layers."""
    modules = dict(model.named_modules(remove_duplicate=False))
    held = {modules[name] for name in names.values() if name in modules}
    matching = matching_modules(model, saved.target_modules or ())
    return [name for name, module in matching.items() if module not in held]


def _layers_with(model: nn.Module, adapter_name: str) -> dict[str, RandLoraLinear]:
    """The layers that have the adapter, as `adapted_layers` names them."""
    _refuse_peft(layers_by_path(model).values())
    adapted = adapted_layers(model)
    if not adapted:
        raise ValueError(
            "model has no adapter: apply_randlora and load_adapter make them, merge_and_unload and "
            "unload take them away; a model of PEFT has save_pretrained"
        )
    known = {adapter: None for layer in adapted.values() for adapter in layer.bases}
    check_one_of("adapter_name", adapter_name, known)
    return {name: layer for name, layer in adapted.items() if adapter_name in layer.bases}


def _refuse_peft(layers: Iterable[AdaptedLayer]) -> None:
    if any(not isinstance(layer, RandLoraLinear) for layer in layers):
        raise TypeError(
            "model has layers of PEFT, which has save_pretrained(folder), load_adapter(folder, "
            "name) and PeftModel.from_pretrained(model, folder) for the same folders"
        )


def _stacks(layers: Mapping[str, RandLoraLinear]) -> dict[str, list[str]]:
    """Of modules with adapted parameters the names of these, the outermost layer's first."""
    stacks: dict[str, list[str]] = {}
    for name, layer in layers.items():
        if layer.experts:
            stacks.setdefault(name.rpartition(".")[0], []).append(name)
    return stacks


def _trained_beside(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters outside of adapters that require a gradient, by their names in the base model."""
    by_path = layers_by_path(model)
    adapters = {
        parameter
        for layer in by_path.values()
        for diagonal in DIAGONALS
        for parameter in getattr(layer, diagonal).values()
    }
    return {
        in_base_model(path, by_path): parameter
        for path, parameter in model.named_parameters()
        if parameter.requires_grad and parameter not in adapters
    }


def _config_of(
    model: nn.Module,
    layers: Mapping[str, RandLoraLinear],
    adapter_name: str,
    trained: Mapping[str, nn.Parameter],
) -> dict[str, Any]:
    """The fields of adapter_config.json. ValueError if layers differ in what it says once."""
    options, *others = (_options(layer, adapter_name) for layer in layers.values())
    for other in others:
        if other != options:
            raise ValueError(
                f"adapter {adapter_name!r} has layers of {options} and of {other}; a folder holds "
                "one set of options, so give them adapters of other names"
            )
    basis = BasisDescription.parse(options["basis"])
    modules = _base_modules(model)
    linear = [name for name, layer in layers.items() if not layer.experts]
    model_class = _class_of(model)
    origin = getattr(model, "name_or_path", None)
    return {
        "auto_mapping": {  # by which PEFT's AutoPeftModel classes find the base model's
            "base_model_class": model_class.__name__,
            "parent_library": model_class.__module__,
        },
        "base_model_name_or_path": origin if origin and isinstance(origin, str) else None,
        "basis": basis.kind,
        "bias": "none",
        "density": basis.density,
        "fan_in_fan_out": any(layers[name].fan_in_fan_out for name in linear),
        "inference_mode": True,
        "modules_to_save": _whole_modules(modules, trained, layers) or None,
        "peft_type": NEEDS_OURS,
        "projection_prng_key": options["basis"],
        "r": options["r"],
        "randlora_alpha": _alpha(options["scaling"], options["r"]),
        "randlora_dropout": options["randlora_dropout"],
        "save_projection": False,
        "target_modules": _target_modules(modules, linear),
        "target_parameters": _target_parameters(model, layers) or None,
        "task_type": None,
    }


def _class_of(model: nn.Module) -> type:
    """Without what torch.compile and fully_shard make of it."""
    classes = type(getattr(model, "_orig_mod", model)).__mro__
    return next(each for each in classes if not each.__module__.startswith("torch.distributed."))


def _options(layer: RandLoraLinear, adapter_name: str) -> dict[str, Any]:
    check_alpha("scaling", layer.scaling[adapter_name])
    description = layer.bases[adapter_name].description
    assert description is not None
    return {
        "r": layer.r[adapter_name],
        "scaling": layer.scaling[adapter_name],
        "randlora_dropout": getattr(layer.randlora_dropout[adapter_name], "p", 0.0),
        "basis": description.key(),
    }


def _alpha(scaling: float, r: int) -> float:
    """A number whose quotient by r is `scaling`, or the nearest one if no float has it."""
    product = float(scaling) * r
    below, above = math.nextafter(product, 0), math.nextafter(product, 2 * product)
    near = (float(round(product)), product, below, above)
    alpha = next((each for each in near if each / r == scaling), product)
    return int(alpha) if alpha.is_integer() else alpha


def _base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the base model by their paths in it, without those of adapters."""
    by_path, modules = layers_by_path(model), {}
    for path, module in model.named_modules(remove_duplicate=False):
        if not _belongs_to_adapters(path, by_path):
            modules[in_base_model(path, by_path)] = module
    return modules


def _belongs_to_adapters(path: str, layers: Container[str]) -> bool:
    """Whether it lies in one of our layers and not below that layer's base layer."""
    names = path.split(".")
    for depth, name in enumerate(names):
        if name != "base_layer" and ".".join(names[:depth]) in layers:
            return True
    return False


def _target_modules(modules: Iterable[str], linear: Sequence[str]) -> list[str] | str:
    """What PEFT matches with these modules and no other: their last names, or an expression."""
    last_names = sorted({name.rpartition(".")[2] for name in linear})
    ends = tuple(f".{name}" for name in last_names)
    if {name for name in modules if f".{name}".endswith(ends)} == set(linear):
        return last_names
    return "|".join(re.escape(name) for name in linear)


def _target_parameters(model: nn.Module, layers: Mapping[str, RandLoraLinear]) -> list[str]:
    """What PEFT matches with these parameters and no other: the names of their modules and their
    own, or whole names. Of each module the innermost layer's first, as PEFT nests them."""
    stacks = [[*reversed(names)] for names in _stacks(layers).values()]  # innermost first
    whole = [name for names in stacks for name in names]
    short = [*dict.fromkeys(_last_two(name) for name in whole)]
    ends = tuple(f".{name}" for name in short)
    by_path = layers_by_path(model)
    known = (in_base_model(path, by_path) for path, _ in model.named_parameters())
    if {name for name in known if f".{name}".endswith(ends)} != set(whole):
        return whole
    for names in stacks:
        order = [_last_two(name) for name in names]
        if order != [name for name in short if name in order]:
            return whole
    return short


def _last_two(name: str) -> str:
    return ".".join(name.split(".")[-2:])


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
    for name, module in modules.items():
        inside = f"{name}."
        if not name or inside.startswith(tuple(f"{other}." for other in found)):
            continue
        if isinstance(module, _CONTAINERS) or any(f"{o}.".startswith(inside) for o in layers):
            continue
        own = {other.removeprefix(inside) for other in trained if other.startswith(inside)}
        is_whole = own and own == {in_base_model(key, ()) for key in module.state_dict()}
        # PEFT trains a copy, which would be tied to nothing.
        if is_whole and all(uses[id(parameter)] == 1 for parameter in module.parameters()):
            found.append(name)
    # PEFT takes every module whose path ends like a name, those of adapters, too.
    others = (*modules, *_OF_PEFT)
    return [name for name in found if not any(o.endswith(name) and o != name for o in others)]


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
    layers: Mapping[str, RandLoraLinear],
    adapted_before: Container[str],
) -> Iterator[str]:
    """Why the adapter does not fit these layers, by their names in the base model; `names` has
    these by the paths in the file."""
    first: dict[nn.Module, str] = {}
    for path, name in names.items():
        layer = layers.get(name)
        if layer is None:
            yield (
                f"{name}: there is no such module or parameter (load before torch.compile and "
                "other wrappers), or it has no adapter and other layers of the file have one"
            )
            continue
        if name in adapted_before and adapter_name in layer.bases:
            yield f"{name}: it has an adapter {adapter_name!r} already; choose another adapter_name"
        weight = layer._base_weight()
        if is_dtensor(weight) or not _is_here(weight):
            yield (
                f"{name}: its weight is not whole here (fully_shard, meta device, DeepSpeed ZeRO-3)"
            )
        basis = Basis(layer.in_features, layer.out_features, saved.r, **vars(saved.basis))
        yield from saved.misfits(path, basis, layer.experts)
        other = first.setdefault(layer, path)
        if not saved.have_equal_tensors(path, other):
            yield f"{name}: it is tied to {names[other]}, whose tensors differ in the file"


def _misfits_of_others(
    saved: SavedAdapter, others: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> Iterator[str]:
    for name, tensor in saved.others.items():
        if name in others:
            yield from tensor_misfits(name, tensor, others[name])
        else:
            yield f"{name}: there is no such parameter, or the model's other adapters use it, too"
    missing = saved.first_missing(state, others)
    if missing is not None:
        yield missing


def _is_here(tensor: Tensor) -> bool:
    return not tensor.is_meta and tensor.numel() > 0  # ZeRO-3 leaves nothing
