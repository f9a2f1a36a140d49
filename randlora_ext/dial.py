"""A dial between what a trained adapter has learned and what it has forgotten.

A trained update times 0.7 keeps most of what it learned and gives back most of what it forgot,
about as a training at a lower rate does, or better, without that training (docs/density.md).
`dial_curve` shows what each factor costs, `set_dial` chooses one.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .batches import moved_to
from .checks import check_number, check_one_of
from .nn.adapted_layer import AdaptedLayer, layers_by_name

FACTORS = (1.0, 0.85, 0.7, 0.55, 0.4, 0.0)
NO_LABEL = -100  # of transformers


class DialPoint(NamedTuple):
    """Mean losses of a model whose dW is multiplied by `factor`."""

    factor: float
    task: float
    text: float


Measured = Iterable[Any] | Callable[[nn.Module], float]


@torch.no_grad()
def dial_curve(
    model: nn.Module,
    task: Measured,
    text: Measured,
    factors: Sequence[float] = FACTORS,
    adapter_name: str = "default",
    plot: str | os.PathLike | None = None,
) -> list[DialPoint]:
    """Measures, prints and draws a model with factor * dW in place of dW; changes nothing.

    For each factor equivalent to the mean of ``model(**batch).loss`` over the batches, weighted by
    how many labels each loss is the mean of, after `set_dial` with this factor. These are the
    labels that are not -100, and of transformers' causal models, which predict no first token,
    those in ``labels[:, 1:]``::

        curve = randlora_ext.dial_curve(model, held_out_batches, text_batches, plot="dial.png")
        randlora_ext.set_dial(model, 0.7)

    Args:
        model: with a trained adapter, by `apply_randlora` or PEFT. It runs in eval mode; afterwards
            each module is in its old mode.
        task: batches of the task that it was trained for, best held-out ones: mappings of the
            model's arguments with "labels", or tensors (rows, tokens) of token numbers without
            padding, which are their own labels. Or a function of the model that returns its loss.
        text: likewise, anything that the model should not forget.
        factors: numbers from 0 on. The loss at 0, without dW, is what the others are compared with.
        adapter_name: which adapter; the model's other active adapters stay as they are.
        plot: a picture to write, which needs matplotlib.

    Returns the points of the curve in the order of `factors`. Trained biases and
    ``modules_to_save`` are not multiplied. If torch.distributed is initialized, the losses are
    those of each rank's own batches, and the first rank prints and draws; if FSDP2 has sharded the
    model, all ranks must call, with equally many batches.

    Raises TypeError or ValueError: a factor is no finite number from 0 on, the adapter is not
    there, not active or merged, or there is no batch or none with labels.

    Source: scaling a finished update is known from LoRA (PEFT's ``scale_layer``) and from model
    arithmetic (arXiv:2212.04089).
    """
    for factor in factors:
        check_number("factors", factor, "finite numbers from 0 on", lambda v: 0 <= v < math.inf)
    layers = _layers(model, adapter_name)
    for name, layer in layers.items():
        if layer.disabled or adapter_name not in layer.active_adapters:
            raise ValueError(
                f"adapter_name {adapter_name!r} is not active in layer {name!r}, so no factor "
                "would change anything"
            )
    first = 1 if _predicts_next(model) else 0
    loss_on_task, loss_on_text = _measure("task", task, first), _measure("text", text, first)
    points = []
    for factor in factors:
        with _with_factor(model, set(layers.values()), adapter_name, factor):
            losses = float(loss_on_task(model)), float(loss_on_text(model))
            points.append(DialPoint(float(factor), *losses))
    distributed = dist.is_available() and dist.is_initialized()
    if not distributed or dist.get_rank() == 0:
        print(table(points))
        if plot is not None:
            _write_plot(points, plot)
    return points


@torch.no_grad()
def set_dial(model: nn.Module, factor: float, adapter_name: str = "default") -> None:
    """Multiplies an adapter's dW by a factor, for good: ``dW = factor * dW``.

    Lambda takes the factor, in place. dW is linear in lambda, so the result is exact up to one
    rounding of each element, and lambda goes everywhere: into files and state dicts, with PEFT and
    without, merged weights, `hotswap_adapter`, ``peft.save_as_lora`` and ``randlora merge``.
    ``scaling`` would not: no state dict holds it, PEFT's ``load_adapter`` over an adapter keeps
    the old one, and alpha in a configuration is an integer by PEFT's declaration.

    Call it after training; an optimizer knows nothing of it. Factors multiply: 0.7 and then 0.5 is
    0.35.

    Args:
        model: with adapters by `apply_randlora` or PEFT.
        factor: a positive finite number.
        adapter_name: which adapter, active or not.

    Raises, and changes nothing: TypeError or ValueError if factor is no such number, the adapter is
    not there or merged, or this process lacks its values (meta device, DeepSpeed ZeRO-3).

    Source: as `dial_curve`.
    """
    check_number("factor", factor, "a positive finite number", lambda v: 0 < v < math.inf)
    layers = _layers(model, adapter_name)
    lambdas = [layer.randlora_lambda[adapter_name] for layer in set(layers.values())]
    for lam in lambdas:
        if lam.is_meta or not lam.numel():
            raise ValueError("lambda has no numbers here (meta device, DeepSpeed ZeRO-3)")
    for lam in lambdas:
        lam.mul_(factor)


def table(points: Sequence[DialPoint]) -> str:
    """The points as lines of text, and the rise of the text's loss if one of them is without dW."""
    without = [point.text for point in points if point.factor == 0]
    lines = ["factor of dW  loss on the task  loss on the text"]
    lines += [f"{factor:12g}  {task:16.3f}  {text:16.3f}" for factor, task, text in points]
    if without:
        lines[0] += "    rise"
        for i, point in enumerate(points, start=1):
            lines[i] += f"{point.text - without[0]:+8.3f}"
    return "\n".join(lines)


def _write_plot(points: Sequence[DialPoint], path: str | os.PathLike) -> None:
    """The task's loss over the text's, a point for a factor. Without dW the task's is far above."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 4), layout="constrained")
    rows = sorted(point for point in points if point.factor > 0)
    axis.plot([row.text for row in rows], [row.task for row in rows], color="tab:red", marker="o")
    for factor, task, text in rows:
        axis.annotate(f"x {factor:g}", (text, task), (4, 4), textcoords="offset points")
    for point in points:
        if point.factor == 0:
            axis.axvline(point.text, color="k", ls=":", label="the text without dW")
            axis.legend()
    axis.set_title("dW times a factor: learned and forgotten")
    axis.set(xlabel="loss on the text, nats per token", ylabel="loss on the task, nats per token")
    axis.margins(0.15)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _layers(model: nn.Module, adapter_name: str) -> dict[str, AdaptedLayer]:
    """Those with the adapter, by their names; ValueError if there are none, or one is merged."""
    found = layers_by_name(model)
    if not found:
        raise ValueError(
            "model has no RandLoRA adapter on our layers; apply_randlora adds one, or PEFT's "
            "get_peft_model after randlora_ext.peft.enable(); merge_and_unload takes it away"
        )
    known = {adapter for layer in found.values() for adapter in layer.randlora_lambda}
    check_one_of("adapter_name", adapter_name, known)
    layers = {n: layer for n, layer in found.items() if adapter_name in layer.randlora_lambda}
    for name, layer in layers.items():
        if adapter_name in layer.merged_adapters:
            raise ValueError(
                f"adapter {adapter_name!r} of layer {name!r} is merged; unmerge it first"
            )
    return layers


@contextmanager
def _with_factor(
    model: nn.Module, layers: set[AdaptedLayer], adapter_name: str, factor: float
) -> Iterator[None]:
    """In eval mode, with a factor in `scaling`, which comes back bit for bit."""
    was_training = {module: module.training for module in model.modules()}
    old_scaling = {layer: layer.scaling[adapter_name] for layer in layers}
    with torch.compiler.set_stance("force_eager"):
        try:
            for layer, scaling in old_scaling.items():
                layer.scaling[adapter_name] = factor * scaling
            model.eval()
            yield
        finally:
            for layer, scaling in old_scaling.items():
                layer.scaling[adapter_name] = scaling
            for module, training in was_training.items():
                module.training = training


def _predicts_next(model: nn.Module) -> bool:
    """Whether it is a causal model of transformers, whose loss leaves out the first label."""
    of_transformers = (m for m in model.modules() if hasattr(type(m), "loss_function"))
    inner: Any = next(of_transformers, None)  # the outermost, below PEFT and DDP
    if inner is None or inner.config.is_encoder_decoder:
        return False
    return getattr(inner.loss_function, "__name__", "") == "ForCausalLMLoss"


def _measure(name: str, given: Measured, first: int) -> Callable[[nn.Module], float]:
    """A function of the model, whose loss counts labels from position `first` on."""
    if callable(given):
        return given
    if isinstance(given, (Tensor, Mapping, str)):
        raise TypeError(f"{name} must be several batches, such as [batch], got one {type(given)}")
    batches = list(given)  # which may be an iterator, and is read for every factor
    if not batches:
        raise ValueError(f"{name} must hold at least one batch, got none")
    for batch in batches:
        _check_batch(name, batch)
    counts = [_labels_in(batch, first) for batch in batches]
    if not any(counts):
        raise ValueError(f"{name} must have labels other than {NO_LABEL} to predict, got none")
    return partial(_mean_loss, batches=batches, counts=counts)


def _check_batch(name: str, batch: Any) -> None:
    allowed = 'tensors of token numbers, or mappings of the model\'s arguments with "labels"'
    if not isinstance(batch, (Tensor, Mapping)):
        raise TypeError(f"{name} must hold {allowed}, got {batch!r}")
    if isinstance(batch, Mapping) and not isinstance(batch.get("labels"), Tensor):
        raise ValueError(f"{name} must hold {allowed}, got a mapping with {[*batch]}")


def _labels_in(batch: Any, first: int) -> int:
    labels = batch["labels"] if isinstance(batch, Mapping) else batch
    counted = labels[:, first:] if labels.dim() > 1 else labels  # a class for each row
    return int((counted != NO_LABEL).sum())


def _mean_loss(model: nn.Module, batches: Sequence[Any], counts: Sequence[int]) -> float:
    total = 0.0
    for batch, labels in zip(batches, counts, strict=True):
        given = batch if isinstance(batch, Mapping) else {"input_ids": batch, "labels": batch}
        outputs = model(**moved_to(model, given))  # all ranks of a sharded model must call it
        loss = float(outputs.loss)
        if labels:  # without any, the loss is NaN
            total += loss * labels
    return total / sum(counts)
