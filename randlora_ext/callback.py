"""`CalibrateCallback`: transformers' Trainer, and all that are built on it, calibrate by it."""

import inspect
import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback

from .calibration import calibrate, layers_to_calibrate
from .nn.adapted_layer import layers_by_name

logger = logging.getLogger(__name__)


class CalibrateCallback(TrainerCallback):
    """Calls `calibrate` before the first step of transformers' ``Trainer``.

    Also of what is built on it, such as TRL, axolotl and ms-swift::

        trainer = Trainer(model, args, callbacks=[randlora_ext.CalibrateCallback()], ...)

    Equivalent to `calibrate` on `batches` batches of the trainer's data before ``trainer.train()``.
    The rows are chosen at random, by a generator of its own, and collated as for training; each
    rank takes rows of its own. Training then sees the same batches as without the callback: no
    sampler is asked, and the states of the random generators of Python, numpy and torch (the CPU's
    and the current CUDA card's) are restored.

    It prints a line when it has calibrated. Otherwise it leaves the model as it is and logs why: as
    INFO if training resumes from a checkpoint, or an active adapter is calibrated already, or none
    is on Hadamard bases or all are disabled; as WARNING if an active adapter has trained or is
    merged, or the batches hold nothing that the model takes, as GRPO's, which are texts.

    An iterable dataset is read from its beginning, so it must begin anew whenever it is iterated.

    Args:
        batches: how many of ``per_device_train_batch_size`` rows each rank measures, at least 1.

    Raises:
        TypeError, ValueError: `batches` is no positive integer; as `calibrate` for inputs that hold
            NaN or infinity.

    Source: ours.
    """

    def __init__(self, batches: int = 4) -> None:
        if isinstance(batches, bool) or not isinstance(batches, int):
            raise TypeError(f"batches must be an integer, got {batches!r}")
        if batches < 1:
            raise ValueError(f"batches must be at least 1, got {batches}")
        self.batches = batches

    def on_train_begin(
        self, args, state, control, model=None, train_dataloader=None, **kwargs
    ) -> None:
        why_needless = _why_needless(model, state.global_step)
        why_not = ""
        if not why_needless:
            why_not = self._calibrate(model, train_dataloader, args.train_batch_size)
        if not state.is_world_process_zero:
            return
        if why_needless:
            logger.info("not calibrated: %s", why_needless)
        elif why_not:
            logger.warning("not calibrated: %s", why_not)
        else:
            # Printed, as Trainer prints its losses. By default its log shows warnings alone, and
            # a warning asks for something to be done.
            print("randlora_ext: calibrated the adapter")

    def _calibrate(self, model: nn.Module, loader: DataLoader, size: int) -> str:
        """Why it could not; "" if it has."""
        try:
            layers_to_calibrate(model)
        except ValueError as error:
            return str(error)
        with _random_states_kept():
            batches = [_arguments(model, batch) for batch in _sample(loader, self.batches, size)]
            if not all(_of_all_ranks(bool(batches) and all(batches))):
                return (
                    "the trainer's batches hold no arguments of the model; call "
                    "randlora_ext.calibrate(model, batches) before training"
                )
            calibrate(model, batches)
        return ""


def _why_needless(model: nn.Module, step: int) -> str:
    """Why nothing is left to do; "" if something is."""
    if step:
        return f"training resumes after step {step}"
    layers = layers_by_name(model).values()
    if not layers:
        return "the model has no RandLoRA adapter"
    active = [
        (layer, adapter)
        for layer in layers
        if not layer.disabled
        for adapter in layer.active_adapters
        if adapter in layer.randlora_input_scale
    ]
    if not active:
        return "no active adapter is on Hadamard bases, and only these can scale their inputs"
    done = sorted({adapter for layer, adapter in active if layer.is_calibrated(adapter)})
    if done:  # and perhaps trained, too
        return f"adapter {', '.join(map(repr, done))} is calibrated already"
    return ""


def _sample(loader: DataLoader, count: int, size: int) -> list[Any]:
    """At most `count` batches of `size` rows of the loader's data set, equally many on all ranks.

    The loader itself is not iterated: its sampler, its workers and accelerate's bookkeeping have
    states that training would find changed.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if _is_distributed() else (0, 1)
    dataset: Any = loader.dataset
    if isinstance(dataset, IterableDataset):
        rows = list(islice(dataset, rank, count * size * ranks, ranks))
    else:
        enough = min(len(dataset), count * size * ranks)
        order = random.Random(0).sample(range(len(dataset)), enough)
        rows = [dataset[i] for i in order[rank::ranks]]
    batches = [loader.collate_fn(rows[i : i + size]) for i in range(0, len(rows), size)]
    # FSDP2 gathers weights in each forward, in which all ranks must take part.
    return batches[: min(_of_all_ranks(len(batches)))]


def _arguments(model: nn.Module, batch: Any) -> dict[str, Any]:
    """What of the batch the model takes."""
    inner: Any = model
    if hasattr(inner, "get_base_model"):  # PEFT's
        inner = inner.get_base_model()
    known = inspect.signature(type(inner).forward).parameters
    given = batch.items() if isinstance(batch, Mapping) else ()
    return {name: value for name, value in given if name in known}


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _of_all_ranks(value: Any) -> list[Any]:
    if not _is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Collators draw masks and data sets augment: whatever they drew, training draws again."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
