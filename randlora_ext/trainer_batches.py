"""Batches of a Trainer's data, read apart from the training."""

import copy
import inspect
import random
from collections.abc import Mapping
from itertools import islice
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from .ranks import rank, world_size

# What tells tokens apart, of which models take some by ``**kwargs`` and hand them on.
_HANDED_ON = {
    "attention_mask", "position_ids", "token_type_ids", "seq_idx",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
}  # fmt: skip


class UnreadableData(Exception):
    """Says in a sentence why the data give no batch of the model's arguments."""


def sample(model: nn.Module, loader: DataLoader, size: int, count: int) -> list[dict[str, Any]]:
    """At least one batch, at most `count`, of `size` rows of the loader's data set: other rows on
    each rank, chosen by a random generator of their own.

    The loader itself is not iterated: its sampler, its workers and accelerate's bookkeeping have
    states that training would find changed. Raises UnreadableData.
    """
    dataset: Any = getattr(loader, "dataset", None)
    if dataset is None:
        raise UnreadableData(
            f"the trainer's loader, {type(loader).__name__}, has no data set to read"
        )
    if loader.batch_sampler is None:  # batch_size=None: each row is a batch
        size = 1
    rows = _rows(dataset, count * size)
    rows = [_copied(row) for row in rows]
    if loader.batch_sampler is None:
        batches = [loader.collate_fn(row) for row in rows]
    else:
        batches = [loader.collate_fn(rows[i : i + size]) for i in range(0, len(rows), size)]
    if not batches:
        raise UnreadableData("the trainer's data set has too few rows")
    return [_arguments(model, batch) for batch in batches]


def _rows(dataset: Any, count: int) -> list[Any]:
    """At most so many of this rank's: each takes others."""
    every = count * world_size()
    if isinstance(dataset, IterableDataset):
        return list(islice(dataset, rank(), every, world_size()))
    chosen = random.Random(0).sample(range(len(dataset)), min(len(dataset), every))
    numbers = chosen[rank() :: world_size()]
    if hasattr(dataset, "__getitems__"):  # as torch's loaders ask first
        return list(dataset.__getitems__(numbers))
    return [dataset[i] for i in numbers]


def _copied(row: Any) -> Any:
    """For collators that change what they get, which the data set will give again. What cannot be
    copied, as an open file or a tensor that has a gradient function, is read as it is."""
    try:
        return copy.deepcopy(row)
    except (TypeError, RuntimeError):
        return row


def _arguments(model: nn.Module, batch: Any) -> dict[str, Any]:
    """What of the batch the model takes."""
    if not isinstance(batch, Mapping):
        raise UnreadableData(
            "the trainer's batches are no mappings of the model's arguments, but "
            f"{type(batch).__name__}"
        )
    inner: Any = model
    if hasattr(inner, "get_base_model"):  # PEFT's
        inner = inner.get_base_model()
    _, *known = inspect.signature(type(inner).forward).parameters.values()  # the first is self
    if all(each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in known):
        return dict(batch)
    names = {each.name for each in known}
    if any(each.kind == each.VAR_KEYWORD for each in known):
        names |= _HANDED_ON
    found = {name: value for name, value in batch.items() if name in names}
    if not found:
        raise UnreadableData(
            f"the trainer's batches hold {[*batch]}, none of which {type(inner).__name__} takes"
        )
    return found
