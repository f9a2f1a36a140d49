"""What finetune.py measures after training: what was learned, forgotten and kept."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache

import spelling
import torch
from finetune_batches import BATCH, written
from finetune_models import loaded
from finetune_tasks import TEXTS, examples
from spelling import NO_LABEL, Example, held_out_loss
from torch import Tensor, nn

KL_EXAMPLES = 32
SCORED = 64  # held-out prompts that are answered


def held_out(task: str, model: str) -> list[Example]:
    return examples(task)[1][: 64 if model == "gemma" else None]  # its vocabulary is large


def learned(tuned: nn.Module, task: str, model: str) -> float:
    return held_out_loss(tuned, loaded(model)[0], held_out(task, model))


def skill(tuned: nn.Module, task: str, model: str) -> dict[str, float]:
    """What it can do: the loss on held-out answers, and how many of its own are right."""
    asked = held_out(task, model)[:SCORED]
    given = spelling.answers(tuned, loaded(model)[0], asked)
    right = sum(text == answer for text, (_, answer) in zip(given, asked, strict=True))
    found = {"held_out_loss": learned(tuned, task, model), "right": right / len(asked)}
    if task == "spelling":
        found["phoneme_errors"] = spelling.phoneme_error_rate(asked, given)
    return found


@cache
def text_of(name: str) -> str:
    return TEXTS[name]()


@cache
def loss_of_base(text: str, model: str) -> float:
    tokenizer, base = loaded(model)
    return spelling.text_loss(base, tokenizer, text_of(text))


def rise(tuned: nn.Module, text: str, model: str) -> float:
    """Of the loss on a text, by training."""
    now = spelling.text_loss(tuned, loaded(model)[0], text_of(text))
    return now - loss_of_base(text, model)


def on_task(tuned: nn.Module, task: str, model: str) -> float:
    """KL(base, tuned), a mean over the tokens of the right answers to held-out prompts."""
    total, count = 0.0, 0
    for p, q in zip(_on_task_of_base(task, model), _on_task(tuned, task, model), strict=True):
        total += float((p.exp() * (p - q)).sum())
        count += len(p)
    return total / count


@cache
def _on_task_of_base(task: str, model: str) -> list[Tensor]:
    return list(_on_task(loaded(model)[1], task, model))


def _on_task(tuned: nn.Module, task: str, model: str) -> Iterator[Tensor]:
    """By batch the log-probabilities (tokens, vocabulary) of the tokens of the answers."""
    asked = examples(task)[1][:KL_EXAMPLES]
    tuned.eval()
    for start in range(0, len(asked), BATCH):
        batch = spelling.make_batch(loaded(model)[0], asked[start : start + BATCH])
        with torch.no_grad():
            logits = spelling.answer_logits(tuned, batch)
        yield logits[batch.labels != NO_LABEL].float().log_softmax(-1)


def on_what_it_wrote(tuned: nn.Module, model: str) -> dict[str, float]:
    """On the base model's own text and, of a chat model, its answers to prompts."""
    own, meter, _ = compared(tuned, "own", model)
    found = {"own": own, "meter": meter}
    if loaded(model)[0].chat_template is not None:
        _, found["chat"], found["agreement"] = compared(tuned, "compared", model)
    return found


def compared(tuned: nn.Module, text: str, model: str) -> tuple[float, float, float]:
    """Per token that the base model wrote: the rise of the loss, KL(base, tuned), and the share
    whose likeliest token is the same."""
    rise, divergence, same, count = 0.0, 0.0, 0, 0
    now = _log_probabilities(tuned, text, model)
    of_base = _log_probabilities_of_base(text, model)
    for batch, (p, likeliest), q in zip(written(text, model), of_base, now, strict=True):
        p, tokens = p.float(), batch["labels"][:, 1:]
        rise += float((p - q).gather(1, tokens[tokens != NO_LABEL][:, None]).sum())
        divergence += float((p.exp() * (p - q)).sum())
        same += int((q.argmax(-1) == likeliest).sum())
        count += len(p)
    return rise / count, divergence / count, same / count


@cache
def _log_probabilities_of_base(text: str, model: str) -> list[tuple[Tensor, Tensor]]:
    """And the likeliest tokens."""
    found = _log_probabilities(loaded(model)[1], text, model)
    return [(p.half(), p.argmax(-1)) for p in found]


def _log_probabilities(tuned: nn.Module, text: str, model: str) -> Iterator[Tensor]:
    """Of each row (tokens, vocabulary), in front of the tokens that the base model wrote."""
    tuned.eval()
    for batch in written(text, model):
        with torch.no_grad():
            logits = tuned(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
        yield logits[batch["labels"][:, 1:] != NO_LABEL].float().log_softmax(-1)


@contextmanager
def scaled_update(tuned: nn.Module, factor: float, model: str) -> Iterator[None]:
    """With factor * dW in place of dW."""
    adapted = [layer for layer in tuned.modules() if hasattr(layer, "get_base_layer")]
    if not adapted:
        with interpolated(tuned, loaded(model)[1], factor):
            yield
        return

    def shrink(layer, inputs, y):
        frozen = layer.get_base_layer()(inputs[0])
        return frozen + factor * (y - frozen)

    linear = [layer for layer in adapted if "OFT" not in type(layer).__module__.upper()]
    with ExitStack() as held:
        for layer in adapted:
            if layer not in linear:
                held.enter_context(layer.register_forward_hook(shrink))
        for layer in linear:
            layer.scaling["default"] *= factor
        try:
            yield
        finally:
            for layer in linear:
                layer.scaling["default"] /= factor


@contextmanager
def interpolated(tuned: nn.Module, base: nn.Module, factor: float) -> Iterator[None]:
    """`scaled_update` of a model all of whose weights have trained."""
    trained = [parameter.detach().clone() for parameter in tuned.parameters()]

    def write(values) -> None:
        with torch.no_grad():
            for parameter, value in zip(tuned.parameters(), values, strict=True):
                parameter.copy_(value)

    write(w.lerp(t, factor) for w, t in zip(base.parameters(), trained, strict=True))
    try:
        yield
    finally:
        write(trained)


@contextmanager
def common_responses(tuned: nn.Module) -> Iterator[dict[str, list[float]]]:
    """Shares of dW's response that are one vector for all tokens, by kind of layer."""
    found: dict[str, list[float]] = {}

    def watch(target: str):
        def hook(layer, inputs, y):
            with torch.no_grad():
                response = (y - layer.get_base_layer()(inputs[0])).float().flatten(0, -2)
            energy = response.square().sum(1).mean()
            if energy > 0:
                found.setdefault(target, []).append(float(response.mean(0).square().sum() / energy))

        return hook

    with ExitStack() as held:
        for name, layer in tuned.named_modules():
            of_experts = hasattr(layer, "parameter_name")
            if hasattr(layer, "get_base_layer") and not of_experts:
                hook = layer.register_forward_hook(watch(name.rpartition(".")[2]))
                held.enter_context(hook)
        yield found
