"""`own_text`: what a language model writes by itself, from which can be told what it knows."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .base_model import base_of
from .batches import device_of
from .checks import check_model, check_seed, warn_user
from .eval_mode import in_eval_mode
from .ranks import is_dtensor

FIRST_TOKENS = "bos_token_id", "eos_token_id"
NO_LABEL = -100  # which torch's cross entropy leaves out


def own_text(
    model: nn.Module,
    rows: int = 8,
    tokens: int = 128,
    prompts: Sequence[Sequence[int] | Tensor] | None = None,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Text that the base model writes by sampling from its full distribution.

    Each row begins with the model's first token, "bos" (or "eos" if it has none), or with a prompt,
    and goes on until the model ends it or has written `tokens` tokens. If the longest row and
    `tokens` exceed the model's positions, all rows get only what that row leaves; a warning says so
    if prompts differ in length.

    Nothing but sampling at a temperature of 1 decides the tokens: the model's own
    ``generation_config`` (temperature, top_k, penalties) does not act, but for the tokens that end
    a text. Equivalent to, of each row::

        while len(written) < tokens and row[-1] not in eos:
            row.append(torch.multinomial(model(row).logits[-1].softmax(-1), 1, generator=own))

    Args:
        model: with transformers' ``generate``, or one that wraps it, as DistributedDataParallel
            does. It writes as its base model, without the adapters of a PeftModel or of
            `RandLoraLinear`, and in eval mode; afterwards it is as before.
        rows: how many, if there are no prompts.
        tokens: how many the model writes at most in a row.
        prompts: rows of token ids without padding, each answered once, as of a chat model
            ``tokenizer.apply_chat_template(chats, add_generation_prompt=True,
            return_dict=True)["input_ids"]``.
        seed: of the generator that samples; torch's own generators stay as they are. If FSDP2 or
            DeepSpeed's ZeRO-3 has sharded the model, all ranks must call, with equally many rows.

    Returns:
        A batch a row, so that none is padded: ``input_ids``, ``attention_mask`` and ``labels``, all
        int64 (1, tokens of the row), on the model's device. The labels of the first token or the
        prompt are -100.

    Raises TypeError if model is no module or cannot ``generate``, or a prompt holds something else
    than integers, or seed is no integer; ValueError if rows or tokens is not positive, seed is not
    in [0, 2**64), a prompt is empty, has a token that is not in the vocabulary or takes all the
    model's positions, there are no prompts, or the configuration names neither a first nor a last
    token.
    """
    check_model(model)
    writer = _writer(model)
    if writer is None:
        raise TypeError(
            "own text needs a decoder with transformers' generate, which continues what it reads, "
            f"got {type(model).__name__}; `forgetting` measures other models that predict tokens "
            "on batches that you give"
        )
    if tokens < 1 or rows < 1:
        raise ValueError(f"rows and tokens must be positive, got {rows} and {tokens}")
    check_seed("seed", seed)
    given = _beginnings(writer, rows) if prompts is None else checked_prompts(prompts)
    _check_vocabulary(writer, given)
    written = _answers(writer, given, tokens, seed)
    device = device_of(writer)
    return [_batch(of, new, device) for of, new in zip(given, written, strict=True)]


def writes_without_prompts(model: nn.Module) -> bool:
    """Whether `own_text` takes the model without prompts."""
    writer = _writer(model)
    return writer is not None and _first_token(writer) is not None


def _writer(model: nn.Module) -> nn.Module | None:
    """The outermost module that generates text, unless an encoder has to read first."""
    outermost: Any = next(filter(_generates, model.modules()), None)
    if outermost is None or getattr(outermost.config, "is_encoder_decoder", False):
        return None
    return outermost


def _generates(module: Any) -> bool:
    # Some have the method, and None for its configuration: transformers' parts of a model.
    configured = getattr(module, "generation_config", None) is not None
    return callable(getattr(module, "generate", None)) and configured


def _vocabulary(model: Any) -> float:
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", math.inf)
    except NotImplementedError:
        return math.inf


def _check_vocabulary(model: Any, rows: list[list[int]]) -> None:
    size = _vocabulary(model)
    for token in itertools.chain(*rows):
        if not 0 <= token < size:
            raise ValueError(f"prompts must hold tokens in [0, {size}), got {token}")


def _first_token(model: Any) -> int | None:
    vocabulary = _vocabulary(model)  # small models keep the tokens of a larger one's configuration
    for name in FIRST_TOKENS:
        token = getattr(model.generation_config, name, None)
        token = getattr(model.config, name, None) if token is None else token
        token = token[0] if isinstance(token, Sequence) else token
        if token is not None and 0 <= token < vocabulary:
            return int(token)
    return None


def _beginnings(model: nn.Module, rows: int) -> list[list[int]]:
    first = _first_token(model)
    if first is None:
        raise ValueError(
            f"{type(model).__name__} can begin no text of its own, as its configuration has "
            f"neither {' nor '.join(FIRST_TOKENS)} in its vocabulary; give prompts"
        )
    return [[first]] * rows


def checked_prompts(prompts: Any) -> list[list[int]]:
    """The prompts as lists of token ids."""
    if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Iterable):
        raise TypeError(f"prompts must be rows of token ids, got {prompts!r}")
    if hasattr(prompts, "tolist"):  # a tensor or array
        raise TypeError(
            "prompts must be rows of token ids without padding, such as lists, got one array, "
            "whose rows may be padded"
        )
    rows = [row.tolist() if hasattr(row, "tolist") else row for row in prompts]
    if not rows or not all(rows):
        raise ValueError(f"prompts must be rows of at least one token, got {prompts!r}")
    for row in rows:
        if not isinstance(row, Sequence) or not all(type(token) is int for token in row):
            raise TypeError(f"prompts must be rows of token ids, got one with {row!r}")
    return [list(row) for row in rows]


def _answers(model: Any, given: list[list[int]], tokens: int, seed: int) -> list[list[int]]:
    """What the model writes behind each row, its last token included."""
    width = max(map(len, given))
    positions = _positions(model)
    if positions is not None and positions - width < tokens:
        room = positions - width
        if room > 0 and min(map(len, given)) < width:
            warn_user(
                f"answers have at most {room} tokens, not {tokens}, since the longest prompt takes "
                f"{width} of the model's {positions} positions"
            )
        tokens = room
    if tokens < 1:
        raise ValueError(
            f"prompts must leave room for an answer in the model's {positions} positions, got one "
            f"of {width} tokens"
        )
    device = device_of(model)
    padding = [width - len(row) for row in given]
    ends = _ends(model)
    pad = ends[0] if ends else 0  # it is masked, so any serves
    ids = [[pad] * n + row for n, row in zip(padding, given, strict=True)]
    mask = [[0] * n + [1] * len(row) for n, row in zip(padding, given, strict=True)]
    generator = torch.Generator(device).manual_seed(seed)

    def sample(_: Tensor, scores: Tensor) -> Tensor:
        """By Gumbel's noise: the largest is one drawn from softmax(scores)."""
        noise = torch.empty_like(scores, dtype=torch.float32).exponential_(generator=generator)
        return scores.float() - noise.log()

    with ExitStack() as held:
        held.enter_context(torch.compiler.set_stance("force_eager"))
        held.enter_context(base_of(model))
        held.enter_context(in_eval_mode(model))
        held.enter_context(_generating_plainly(model))
        rows = model.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=pad,
            use_cache=True,
            logits_processor=[sample],
            synced_gpus=_is_sharded(model),
        )
    return [_up_to_the_end(row[width:], ends) for row in rows.tolist()]


def _positions(model: Any) -> int | None:
    """How many tokens it can read; None if nothing says so."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else None
    positions = getattr(config, "max_position_embeddings", None)
    return positions if positions and positions > 0 else None  # XLNet's are -1: any number


def _ends(model: Any) -> list[int]:
    """The tokens that end a text."""
    ends = model.generation_config.eos_token_id
    ends = getattr(model.config, "eos_token_id", None) if ends is None else ends
    if ends is None:
        return []
    return [ends] if isinstance(ends, int) else list(ends)


def _up_to_the_end(row: list[int], ends: list[int]) -> list[int]:
    length = next((i for i, token in enumerate(row, 1) if token in ends), len(row))
    return row[:length]


def _is_sharded(model: nn.Module) -> bool:
    """Whether ranks must compute together, so that all go on until the longest row has ended."""
    return any(is_dtensor(p) or hasattr(p, "ds_id") for p in model.parameters())


@contextmanager
def _generating_plainly(model: Any) -> Iterator[None]:
    """`model.generate` follows its arguments alone, and gathers what FSDP2 gathers in forward."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # A PeftModel with a configuration of its own gives it to the base.
    writers = [each for each in (base, model) if "generation_config" in vars(each)]
    registers = dist.is_available() and _registered_with_fsdp(model)
    with ExitStack() as held:
        for writer in writers:
            own = writer.generation_config
            held.callback(setattr, writer, "generation_config", own)
            writer.generation_config = type(own)()
        if registers:
            held.callback(delattr, model, "generate")
        yield


def _registered_with_fsdp(model: nn.Module) -> bool:
    registered = "generate" in vars(model)  # by transformers' Trainer
    if registered or not any(map(is_dtensor, model.parameters())):
        return False
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method  # slow to import

    register_fsdp_forward_method(model, "generate")  # does nothing to other modules
    return isinstance(model, FSDPModule)


def _batch(given: list[int], written: list[int], device: torch.device) -> dict[str, Tensor]:
    ids = torch.tensor([given + written], device=device)
    labels = ids.clone()
    labels[:, : len(given)] = NO_LABEL
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
