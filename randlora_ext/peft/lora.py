"""`export_to_lora`: the nearest LoRA adapter, which servers and other libraries read."""

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import torch.nn.functional as F
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..writing import appear_together
from .layer import layers_with, refuse_sharded
from .saving import copy_card, write_card

# What vLLM takes as --max-lora-rank (MaxLoRARanks in vllm/config/lora.py).
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
PREFIX = "base_model.model."


class LoraExport(NamedTuple):
    """What `export_to_lora` wrote.

    Attributes:
        rank: r of the LoRA adapter.
        energy: its share of the squared Frobenius norm of dW, over all layers.
        layers: that share by the layer's path in the base model; 1 if dW = 0.
    """

    rank: int
    energy: float
    layers: dict[str, float]

    @property
    def note(self) -> str:
        """What the model card says of it."""
        return (
            f"It is the LoRA of rank {self.rank} that is nearest to a RandLoRA adapter, and keeps "
            f"{self.energy:.4f} of the squared norm of that adapter's change of the weights."
        )


def export_to_lora(
    model: peft.PeftModel,
    folder: str | os.PathLike,
    rank: int | None = None,
    energy: float | None = None,
    adapter_name: str = "default",
) -> LoraExport:
    """Writes the LoRA adapter of one rank that is nearest to a RandLoRA adapter.

    Equivalent, for every layer, to ``U, S, Vh = torch.linalg.svd(layer.get_delta_weight(name))``
    with ``lora_B = U[:, :rank] * S[:rank].sqrt()``, ``lora_A = S[:rank, None].sqrt() * Vh[:rank]``
    in float32, and lora_alpha = r, so that the scaling is 1. Needs the memory of the new adapter
    and of one layer's dW. Singular vectors are eigenvectors of dW dW^T (or dW^T dW, whichever is
    smaller) in float64.

    Args:
        model: a PeftModel with RandLoRA layers, ours or stock PEFT's.
        folder: where adapter_config.json, adapter_model.safetensors and a model card appear when
            complete.
        rank: r. A layer with fewer features is padded with zeros.
        energy: instead of `rank`, in (0, 1]: the smallest rank that vLLM has a setting for (1, 8,
            16, 32, 64, 128, 256, 320, 512) at which all layers together keep this share of the
            squared Frobenius norm of dW.
        adapter_name: which adapter.

    Raises, and writes nothing: TypeError if `model` is no PeftModel over RandLoRA layers;
    ValueError for an unknown adapter, not exactly one of `rank` and `energy`, a value out of range,
    an energy that no rank keeps, and NaN or infinity in dW.
    """
    refuse_sharded(model)
    deltas = {
        path: functools.partial(weight_change, layer, adapter_name)
        for path, layer in layers_with(model, adapter_name).items()
    }
    others = {
        key: tensor
        for key, tensor in peft.get_peft_model_state_dict(model, adapter_name=adapter_name).items()
        if "randlora_" not in key
    }
    modules = [name for name, _ in model.base_model.model.named_modules()]
    with appear_together(folder) as scratch:
        fields = shared_fields(model.peft_config[adapter_name])
        done = write_lora(scratch, deltas, fields, modules, rank, energy, others)
        copy_card(folder, scratch)
        write_card(scratch, Path(folder).absolute().name, model, done.note)
        return done


def weight_change(layer: Any, adapter_name: str) -> Tensor:
    """dW (out, in) of a layer, whatever the layout of its weight."""
    delta = layer.get_delta_weight(adapter_name)
    return delta.T if getattr(layer, "fan_in_fan_out", False) else delta


def write_lora(
    folder: Path,
    deltas: Mapping[str, Callable[[], Tensor]],
    fields: Mapping[str, Any],
    modules: Iterable[str],
    rank: int | None,
    energy: float | None,
    others: Mapping[str, Tensor],
) -> LoraExport:
    """`export_to_lora` without a model.

    Args:
        deltas: functions that make dW (out, in), by the layer's path in the base model.
        fields: of the LoraConfig, beside rank, alpha and targets.
        modules: all paths in the base model, to see which ones `target_modules` would match.
        others: further tensors of the adapter, by their keys in the file.
    """
    if (rank is None) == (energy is None):
        raise ValueError(f"give either rank or energy, got rank={rank}, energy={energy}")
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank must be a positive integer, got {rank!r}")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], got {energy!r}")
    if rank is None:
        assert energy is not None
        told = _bar(deltas, "singular values")
        rank = _smallest_rank([_squares(_finite(path, make())) for path, make in told], energy)
    tensors, squares = dict(others), {}
    for path, make in _bar(deltas, f"rank {rank}"):
        squares[path], A, B = _factors(_finite(path, make()), rank)
        tensors[f"{PREFIX}{path}.lora_A.weight"] = F.pad(A, (0, 0, 0, rank - len(A)))
        tensors[f"{PREFIX}{path}.lora_B.weight"] = F.pad(B, (0, rank - len(A)))
    peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=target_modules(deltas, modules),
        inference_mode=True,
        **fields,
    ).save_pretrained(str(folder))
    # Copies, since PEFT names a bias of modules_to_save twice.
    tensors = {key: t.clone(memory_format=torch.contiguous_format) for key, t in tensors.items()}
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    layers = {path: _kept([values], rank) for path, values in squares.items()}
    return LoraExport(rank, _kept(squares.values(), rank), layers)


def shared_fields(config: peft.PeftConfig) -> dict[str, Any]:
    """The fields that a RandLoRA and a LoRA configuration share."""
    names = "fan_in_fan_out", "modules_to_save", "task_type", "base_model_name_or_path"
    fields = {name: getattr(config, name) for name in names}
    return fields | {"bias": config.bias.replace("randlora", "lora")}


def target_modules(layers: Iterable[str], modules: Iterable[str]) -> list[str] | str:
    """The shortest `target_modules` that matches `layers` and no other of `modules`.

    Last names, which all readers take; else paths; else a regular expression, which PEFT takes.
    """
    layers, modules = sorted(layers), list(modules)
    for names in (sorted({path.rpartition(".")[2] for path in layers}), layers):
        ends = tuple(f".{name}" for name in names)
        if all((path in layers) == f".{path}".endswith(ends) for path in modules):
            return names
    return "|".join(path.replace(".", r"\.") for path in layers)


def _bar(deltas: Mapping[str, Callable], what: str) -> Iterable[tuple[str, Callable]]:
    return tqdm(deltas.items(), desc=what, unit="layer", leave=False)


def _finite(path: str, delta: Tensor) -> Tensor:
    if not bool(torch.isfinite(delta).all()):
        raise ValueError(f"{path}: dW holds NaN or infinity")
    return delta.detach().float()


def _gram(delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dW or its transpose, whichever is wide, in float64; its rows that are not 0; their Gram
    matrix). Sparse bases leave rows 0, which would only enlarge the eigenproblem.
    """
    wide = (delta if delta.shape[0] <= delta.shape[1] else delta.T).double()
    rows = wide.any(1).nonzero().flatten()
    return wide, rows, wide[rows] @ wide[rows].T


@torch.no_grad()
def _squares(delta: Tensor) -> Tensor:
    """Squared singular values, descending."""
    return torch.linalg.eigvalsh(_gram(delta)[2]).clamp(min=0).flip(0)


@torch.no_grad()
def _factors(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Squared singular values, lora_A (k, in) and lora_B (out, k), k <= `rank`.

    A and B have equal norms: a server casts them to 16 bits, where a small one could vanish.
    """
    wide, rows, gram = _gram(delta)
    values, vectors = torch.linalg.eigh(gram)
    vectors = vectors.flip(1)[:, :rank]
    vectors = vectors.new_zeros(len(wide), vectors.shape[1]).index_copy_(0, rows, vectors)
    projected = vectors.T @ wide
    root = projected.norm(dim=1).sqrt()
    A = (projected / root.where(root > 0, 1.0).unsqueeze(1)).float()
    B = (vectors * root).float()
    A, B = (A, B) if delta.shape[0] <= delta.shape[1] else (B.T, A.T)
    return values.clamp(min=0).flip(0), A, B


def _kept(squares: Iterable[Tensor], rank: int) -> float:
    squares = list(squares)
    total = sum(float(values.sum()) for values in squares)
    return sum(float(values[:rank].sum()) for values in squares) / total if total else 1.0


def _smallest_rank(squares: list[Tensor], energy: float) -> int:
    kept = {rank: _kept(squares, rank) for rank in RANKS}
    if not (enough := [rank for rank, share in kept.items() if share >= energy]):
        raise ValueError(
            f"energy={energy} needs a rank above {RANKS[-1]}, which keeps {kept[RANKS[-1]]:.4f}; "
            "vLLM takes no higher one: ask for less, give a rank, or merge"
        )
    return enough[0]
