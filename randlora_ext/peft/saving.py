"""Saving: files that are complete when they appear, and files that stock PEFT opens."""

import copy
import dataclasses
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import peft
import torch.nn.functional as F
from safetensors.torch import save_model
from torch import Tensor

from ..basis import TernaryBasis
from ..ops.dtensor import full_tensor, is_dtensor
from ..writing import appear_together
from .adapter_basis import BASIS_NAMES, AdapterBasis, largest, make_bases
from .card import copy_card
from .config import record_configurations
from .layer import layers_with, refuse_sharded
from .ternary_tensor import TernaryTensor


def save_together(
    save: Callable,
    model: peft.PeftModel,
    folder: str | os.PathLike,
    is_main_process: bool = True,
    state_dict: Mapping[str, Any] | None = None,
) -> None:
    """Has `save` (PeftModel's ``save_pretrained``) write into a scratch folder first.

    If transformers has sharded the model, all ranks must call unless `state_dict` is whole, as
    with stock PEFT. If the main process cannot write, all ranks raise.
    """
    state: Any = state_dict
    mesh = getattr(model.base_model.model, "_device_mesh", None)
    if mesh is not None and state is None:
        state = model.state_dict()
    with ExitStack() as stack:
        if mesh is not None and any(map(is_dtensor, state.values())):
            from ..distributed.agreement import failing_together  # imports torch.distributed

            # PEFT would gather while it writes, and the others wait for a rank that cannot.
            state = {k: full_tensor(v).cpu() if is_dtensor(v) else v for k, v in state.items()}
            stack.enter_context(failing_together(mesh))
            if not is_main_process:
                return
        if os.path.isfile(folder) or not is_main_process:  # PEFT's own error; nothing is written
            return save(folder, state_dict=state)
        scratch = stack.enter_context(appear_together(folder))
        copy_card(folder, scratch)
        save(str(scratch), state_dict=state)
        record_configurations(scratch)


def export_to_peft(model: peft.PeftModel, folder: str | os.PathLike, merged: bool = False) -> None:
    """Writes what stock PEFT opens with the same numbers, whatever the bases are.

    Equivalent to ``model.save_pretrained(folder)`` of a stock model with ``save_projection=True``
    whose bases are these: generated ones and those of any density are written dense, and the
    configuration has PEFT's fields only. Old files stay until the new ones are complete. Stock
    PEFT shares one A and one B among all layers, so Hadamard bases can only be written for layers
    of one min(in, out). PEFT up to 0.21.2 warns of "missing adapter keys", the copies
    that its own files hold for every layer, but loads these files correctly.

    Args:
        model: a PeftModel. Each adapter is written as by PEFT: "default" into the folder, others
            into folders of their name.
        merged: write the base model with the active adapters merged into its weights instead, by
            ``save_pretrained`` of the base model, or as model.safetensors if it has none. A copy
            is merged. 16-bit weights round the sum to 16 bits; ``model.float()`` first avoids it.

    Raises TypeError if model is no PeftModel over RandLoRA layers, ValueError if Hadamard
    bases belong to layers of different min(in, out), which it names.
    """
    layers_with(model)
    if merged:
        refuse_sharded(model)
    with appear_together(folder) as scratch:
        if merged:
            _save_merged(model, scratch)
        else:
            copy_card(folder, scratch)
            _save_adapters(model, scratch)


def _save_merged(model: peft.PeftModel, folder: Path) -> None:
    plain = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    if hasattr(plain, "save_pretrained"):
        plain.save_pretrained(folder)
    else:
        save_model(plain, str(folder / "model.safetensors"))


def _save_adapters(model: peft.PeftModel, folder: Path) -> None:
    configs = dict(model.peft_config)
    copies = tuple(f".{bases}." for bases in BASIS_NAMES)
    state = {k: v for k, v in model.state_dict().items() if not any(part in k for part in copies)}
    for name, config in configs.items():
        layers = {
            path: (layer.in_features, layer.out_features)
            for path, layer in layers_with(model, name).items()
        }
        A, B = (getattr(model.base_model, bases)[name] for bases in BASIS_NAMES)
        if AdapterBasis.of(vars(config)).kind != "peft":
            # Another adapter's may be larger, and PEFT's casts do not round generated ones.
            A, B = make_bases(config, *largest(layers.values()))
        for bases, dense in zip(BASIS_NAMES, dense_bases(A, B, layers), strict=True):
            state[f"base_model.{bases}.{name}"] = dense.detach()
    try:
        for name, config in configs.items():
            packed = isinstance(model.base_model.randlora_A[name], TernaryTensor)
            model.peft_config[name] = stock_config(config, packed)
        model.save_pretrained(str(folder), state_dict=state)
    finally:
        model.peft_config.update(configs)


def dense_bases(
    A: Tensor, B: Tensor, layers: Mapping[str, tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """A (r, 1, d) and B (D, n, r), dense, from which stock PEFT slices the bases of all layers.

    Args:
        layers: (in_features, out_features) by name. Of Hadamard bases, B of a smaller layer is a
            part of that of a larger one; A is so only if min(in, out) is equal, since it decides
            the classes.

    Raises ValueError, naming two layers, if Hadamard bases belong to layers whose min(in, out)
    differ.
    """
    if not (isinstance(A, TernaryTensor) and A.is_hadamard):
        A, B = (t.dense() if isinstance(t, TernaryTensor) else t for t in (A, B))
        return A, B
    (first, sizes), *others = layers.items()
    for other, its in others:
        if min(its) != min(sizes):
            raise ValueError(
                "stock PEFT has one pair of bases for all layers, and A of Hadamard bases depends "
                f"on min(in, out): layer {first!r} has {sizes[0]} -> {sizes[1]} features, layer "
                f"{other!r} {its[0]} -> {its[1]}; merge instead (export_to_peft(..., merged=True) "
                "or `randlora merge`)"
            )
    assert A.signs.description is not None
    (r, _, d), (D, n, _), small = A.shape, B.shape, min(sizes)
    A, B = TernaryBasis(small, D, r, None, A.signs.description.seed, "hadamard").dense()
    A, B = F.pad(A, (0, d - small)), F.pad(B, (0, n * r - B.shape[1]))
    return A.unsqueeze(1), B.unflatten(1, (n, r))


def stock_config(config: peft.RandLoraConfig, packed: bool) -> peft.RandLoraConfig:
    """PEFT's own configuration with the fields that it knows.

    Args:
        packed: whether the bases are ternary.
    """
    values = {
        field.name: copy.deepcopy(getattr(config, field.name))
        for field in dataclasses.fields(peft.RandLoraConfig)
        if field.init
    }
    values["projection_prng_key"] = AdapterBasis.of(vars(config)).seed
    values["save_projection"] = True
    # Stock PEFT draws bases before it loads these over them. It keeps uniform ones in bfloat16,
    # which would round the value, and sparse ones in float32.
    values["sparse"] = packed and not config.very_sparse
    return peft.RandLoraConfig(**values)
