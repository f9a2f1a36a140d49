"""`forgetting`: how far a tuned model is from its base model, a number that needs no data."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .base_model import base_of, layers_without_peft, peft_models
from .batches import check_batches, moved_to
from .checks import check_model, check_seed
from .eval_mode import in_eval_mode, without_cache
from .own_text import NO_LABEL, own_text
from .ranks import failing_together, of_all_ranks, rank

NUMBERS_AT_ONCE = 2**24  # of logits in float32, so that a large vocabulary takes no more memory

# By PEFT's ``init_lora_weights``: W becomes W - BA.
_CHANGE_THE_BASE = "pissa", "olora", "corda", "loftq", "lora_ga"

_NO_TOKENS = f"batches must hold tokens that count, labels other than {NO_LABEL}"


class Forgetting(NamedTuple):
    """What `forgetting` has measured."""

    nats: float  # a token, the mean
    standard_error: float  # of that mean; NaN of a single row
    tokens: int  # how many were counted


@torch.no_grad()
def forgetting(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    prompts: Sequence[Sequence[int] | Tensor] | None = None,
    seed: int = 0,
) -> Forgetting:
    """How much a tuned model has forgotten: KL(base, tuned) in nats per token.

    By its definition the rise of the loss on text that the base model writes. It depends on the
    text (docs/evidence.md), so compare two adapters on the same one, which the same seed gives::

        print(randlora_ext.forgetting(model))  # of RandLoRA, LoRA, any PeftModel

    Equivalent to, over the tokens that count::

        log_p, log_q = base_logits.log_softmax(-1), tuned_logits.log_softmax(-1)  # in float32
        (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    The base is the same model with its adapters disabled: the original modules in place of
    ``modules_to_save``, too. The standard error takes rows as independent, not tokens, which depend
    on the tokens before them.

    Args:
        model: with adapters that are not merged, a PeftModel, or one that has `RandLoraLinear`
            layers and is frozen otherwise; it may be wrapped, as by DistributedDataParallel. It
            runs in eval mode, and afterwards is as before.
        batches: mappings of the model's arguments; or tensors (rows, tokens) of token numbers,
            without padding. "labels" (rows, tokens) say which tokens count, those that are not
            -100; without labels all do that "attention_mask" does not leave out. transformers'
            causal models predict each token from those before it, so for these models the first
            token of a row does not count, nor one that follows a masked token. By default the base
            model writes 8 rows of at most 128 tokens (`randlora_ext.own_text.own_text`).
        prompts: of a chat model, rows of token numbers without padding, such as
            ``tokenizer.apply_chat_template(chats, add_generation_prompt=True,
            return_dict=True)["input_ids"]``. The base model answers them, and the tokens of its
            answers count.
        seed: of what the base model writes. No random state changes.

    If torch.distributed is initialized, all ranks must call, each with its own batches, equally
    many if the model is sharded; every rank writes other text, and all get the number of all rows.
    If one rank fails, the others raise RuntimeError.

    Raises TypeError or ValueError: model is no module, or has no adapter; PEFT cannot take an
    adapter back, because it is merged, trains biases or other weights of the base model, or began
    by changing these (LoRA's "pissa" and its like); both batches and prompts are given; a batch is
    something else; no token counts; the model gives no logits for each token, or they are not
    finite; or what `own_text` raises.

    Source: ours. That what reinforcement learning forgets goes with this divergence was seen in
    arXiv:2509.04259.
    """
    check_model(model)
    _check_adapters(model)
    check_seed("seed", seed)
    if batches is None:
        batches = own_text_of(model, prompts, seed)
    elif prompts is not None:
        raise ValueError("batches and prompts are two texts; give one of them")
    check_batches(batches)
    rows: list[tuple[float, int]] = []
    with (
        failing_together(),
        in_eval_mode(model),
        without_cache(model),
        torch.compiler.set_stance("force_eager"),
    ):
        for batch in batches:
            rows += _measure(model, batch)
    return _mean([row for of_rank in of_all_ranks(rows) for row in of_rank])


def own_text_of(model: nn.Module, prompts: Any = None, seed: int = 0) -> list[dict[str, Tensor]]:
    """`own_text` by the base of a model; other text on every rank."""
    with failing_together():
        return own_text(model, prompts=prompts, seed=seed + rank())


def _check_adapters(model: nn.Module) -> None:
    """ValueError unless disabling the adapters gives the base model, and enabling them this one."""
    parts: list[Any] = peft_models(model)
    if not parts and not layers_without_peft(model):
        raise ValueError(
            "model has no adapter to disable: give a PeftModel, or one with RandLoraLinear layers"
        )
    for name, module in model.named_modules():
        merged = getattr(module, "merged_adapters", None)  # of PEFT's layers and of ours
        if isinstance(merged, Sequence) and merged:
            raise ValueError(f"adapter {merged[0]!r} of layer {name!r} is merged; unmerge it first")
    for part in parts:
        for adapter, config in part.peft_config.items():  # inactive ones, too
            bias = getattr(config, "bias", "none")
            if bias != "none":
                raise ValueError(
                    f"adapter {adapter!r} trains biases (bias={bias!r}), which stay when it is "
                    "disabled, so the base model is not at hand"
                )
            if how := _changed_the_base(config):
                raise ValueError(
                    f"adapter {adapter!r} was initialized by {how!r}, which changes the base "
                    "weights, so the base model is not at hand"
                )
    bases = [_without_peft(part) for part in parts] or [model]
    name = next(itertools.chain(*map(_trained_beside_adapters, bases)), None)
    if name is not None:
        raise ValueError(
            f"parameter {name!r} of the base model trains, and stays when adapters are "
            "disabled, so the base model is not at hand; freeze it (PEFT's modules_to_save keeps "
            "both)"
        )


def _changed_the_base(config: Any) -> str:
    """By what initialization; "" if by none."""
    if getattr(config, "kasa_config", None) is not None:
        return "KaSA"
    started = getattr(config, "init_lora_weights", None)
    if isinstance(started, str) and started.lower().startswith(_CHANGE_THE_BASE):
        return started
    return ""


def _without_peft(model: Any) -> nn.Module:
    # PeftMixedModel lacks the method.
    has_method = hasattr(type(model), "get_base_model")
    return model.get_base_model() if has_method else model.base_model.model


def _trained_beside_adapters(base: nn.Module) -> Iterator[str]:
    """The names of parameters that train and that neither PEFT nor this package manages."""
    managed: set[nn.Module] = set()
    for module in base.modules():
        packages = {each.__module__.partition(".")[0] for each in type(module).__mro__}
        if packages & {"peft", "randlora_ext"}:
            managed.update(module.modules())
    for path, module in base.named_modules():
        if module not in managed:
            for name, parameter in module.named_parameters(path, recurse=False):
                if parameter.requires_grad:
                    yield name


def _measure(model: nn.Module, batch: Any) -> list[tuple[float, int]]:
    """Of each row of the batch the sum over its tokens that count, and how many these are."""
    arguments = _arguments(batch)
    labels = _labels(arguments)
    predicts_next = _predicts_next(model)
    if predicts_next:
        arguments = {name: value for name, value in arguments.items() if name != "labels"}
    counted = labels != NO_LABEL
    if predicts_next:
        counted = counted[:, 1:] & ~_is_padding(arguments, labels)[:, :-1]

    def logits() -> Tensor:
        found = getattr(model(**moved_to(model, arguments)), "logits", None)
        if not isinstance(found, Tensor) or found.shape[:-1] != labels.shape:
            shape = tuple(found.shape) if isinstance(found, Tensor) else found
            raise ValueError(
                f"model must give logits (rows, tokens, vocabulary) for {tuple(labels.shape)} "
                f"tokens, got {shape}"
            )
        found = found[:, :-1] if predicts_next else found
        return found[counted.to(found.device)]

    tuned = logits()
    with base_of(model):
        base = logits()
    sums = torch.zeros(counted.shape, dtype=torch.float64)
    sums[counted.cpu()] = _divergence(base, tuned).cpu().double()
    return list(zip(sums.sum(1).tolist(), counted.sum(1).tolist(), strict=True))


def check_text(batches: Sequence[Any]) -> None:
    """Raises TypeError or ValueError unless these batches have the form that `forgetting` takes,
    and those of some rank have a token that counts; all ranks must call."""
    with failing_together():
        counted = [bool((_labels(_arguments(batch)) != NO_LABEL).any()) for batch in batches]
    if not any(of_all_ranks(any(counted))):
        raise ValueError(_NO_TOKENS)


def _arguments(batch: Any) -> Mapping[str, Any]:
    if isinstance(batch, Tensor):
        return {"input_ids": batch}
    if not isinstance(batch, Mapping):
        raise TypeError(
            "batches must hold tensors of token numbers, or mappings of the model's arguments, "
            f"got {batch!r}"
        )
    return batch


def _labels(arguments: Mapping[str, Any]) -> Tensor:
    labels = arguments.get("labels")
    if labels is None and "decoder_input_ids" in arguments:
        raise ValueError('batches that hold "decoder_input_ids" must hold "labels", too')
    if labels is None:
        labels, mask = arguments.get("input_ids"), arguments.get("attention_mask")
        if isinstance(labels, Tensor) and isinstance(mask, Tensor):
            labels = labels.masked_fill(mask == 0, NO_LABEL)
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        found = tuple(labels.shape) if isinstance(labels, Tensor) else labels
        raise ValueError(
            'batches must hold "labels" or "input_ids", tensors (rows, tokens), got '
            f"{found} in one with {[*arguments]}"
        )
    return labels


def _is_padding(arguments: Mapping[str, Any], labels: Tensor) -> Tensor:
    mask = arguments.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != labels.shape:
        return torch.zeros_like(labels, dtype=torch.bool)
    return (mask == 0).to(labels.device)


def _predicts_next(model: nn.Module) -> bool:
    """Whether it is a causal model of transformers, whose loss leaves out the first label."""
    of_transformers = (m for m in model.modules() if hasattr(type(m), "loss_function"))
    inner: Any = next(of_transformers, None)  # the outermost, below PEFT and DDP
    if inner is None or inner.config.is_encoder_decoder:
        return False
    return getattr(inner.loss_function, "__name__", "") == "ForCausalLMLoss"


def _divergence(base: Tensor, tuned: Tensor) -> Tensor:
    """KL(base, tuned) of each token, of logits (tokens, vocabulary)."""
    at_once = max(1, NUMBERS_AT_ONCE // base.shape[-1])
    parts = []
    for of_base, of_tuned in zip(base.split(at_once), tuned.split(at_once), strict=True):
        log_p, log_q = of_base.float().log_softmax(-1), of_tuned.float().log_softmax(-1)
        each = log_p.exp() * (log_p - log_q)
        # A token that the base never says adds nothing, whatever the other says of it.
        parts.append(each.masked_fill(log_p == -math.inf, 0).sum(-1))
    return torch.cat(parts)


def _mean(rows: list[tuple[float, int]]) -> Forgetting:
    rows = [(total, tokens) for total, tokens in rows if tokens]
    if not rows:
        raise ValueError(_NO_TOKENS)
    counted = sum(tokens for _, tokens in rows)
    nats = sum(total for total, _ in rows) / counted
    if not math.isfinite(nats):
        raise ValueError(f"the logits of model or of its base are not finite: their KL is {nats}")
    if len(rows) == 1:
        return Forgetting(nats, math.nan, counted)
    off = sum((total - nats * tokens) ** 2 for total, tokens in rows)
    error = math.sqrt(off * len(rows) / (len(rows) - 1)) / counted
    return Forgetting(nats, error, counted)
