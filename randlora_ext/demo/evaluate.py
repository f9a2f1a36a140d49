"""Held-out loss and greedy answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .batch import (
    IGNORED_LABEL,
    answer_logits,
    answer_loss,
    encode_answer,
    make_batch,
    make_prompts,
)
from .data import Example

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

_BATCH = 32


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    device: torch.device,
) -> float:
    """Mean cross entropy over all answer tokens of ``examples``, each token counted once."""
    model.eval()
    total, count = 0.0, 0
    # Rows of similar length together: less padding to compute.
    ordered = sorted(examples, key=lambda example: len(example.prompt) + len(example.answer))
    for start in range(0, len(ordered), _BATCH):
        batch = make_batch(tokenizer, ordered[start : start + _BATCH], device)
        total += answer_loss(model, batch, reduction="sum").item()
        count += int((batch.labels != IGNORED_LABEL).sum())
    return total / count


@torch.no_grad()
def greedy_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    device: torch.device,
) -> list[str]:
    """What the model answers to each prompt, greedily, cut at the longest true answer's length."""
    model.eval()
    limit = max(len(encode_answer(tokenizer, example)) for example in examples)
    prompts = make_prompts(tokenizer, examples, device)
    generate: Any = model.generate
    output = generate(
        **prompts,
        max_new_tokens=limit,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    new_tokens = output[:, prompts["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]


@torch.no_grad()
def check_logits(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    device: torch.device,
) -> Tensor:
    """Answer logits of ``examples`` in one batch, to compare two models."""
    model.eval()
    return answer_logits(model, make_batch(tokenizer, examples, device))


def exact_matches(examples: Sequence[Example], answers: Sequence[str]) -> int:
    """How many answers equal the truth, white space aside."""
    pairs = zip(examples, answers, strict=True)
    return sum(answer == " ".join(example.answer.split()) for example, answer in pairs)


def symbol_error_rate(examples: Sequence[Example], answers: Sequence[str]) -> float:
    """Edits needed to mend the answers, over the symbols (here phonemes) in the truth.

    Symbols are what white space separates. 0 is perfect; long wrong answers can exceed 1.
    """
    truths = [example.answer.split() for example in examples]
    edits = sum(_edits(t, a.split()) for t, a in zip(truths, answers, strict=True))
    return edits / sum(map(len, truths))


def _edits(truth: list[str], answer: list[str]) -> int:
    """Levenshtein distance, one row at a time."""
    row = list(range(len(answer) + 1))
    for i, symbol in enumerate(truth, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(answer, start=1):
            cost = min(diagonal + (symbol != other), row[j] + 1, row[j - 1] + 1)
            diagonal, row[j] = row[j], cost
    return row[-1]
