"""Token batches and the loss over exactly the answer.

Prompts are padded on the left and answers on the right, so that the border lies in one column:

    . . l u m p  -> | L AH M P <end> .
    n e g a t e  -> | N AH G EY T <end>

The logits of the answers are then the last columns of the batch, and the model is asked for those
alone: with 49,152 words to choose from, the others would cost a tenth of the step for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .data import Example

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100  # cross_entropy's default ignore_index


@dataclass(frozen=True)
class Batch:
    """``inputs`` for the model, (rows, prompt + answer columns), and ``labels`` (rows, answer)."""

    inputs: dict[str, Tensor]
    labels: Tensor

    @property
    def tokens(self) -> int:
        """Tokens that the model computes, padding included."""
        return self.inputs["input_ids"].numel()


def make_batch(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], device: torch.device
) -> Batch:
    """Tokenize and pad prompts with their answers, each ended by the end-of-text token."""
    prompts = [encode_prompt(tokenizer, example) for example in examples]
    answers = [encode_answer(tokenizer, example) for example in examples]
    pad = tokenizer.pad_token_id
    width = max(map(len, answers))
    labels = [row + [IGNORED_LABEL] * (width - len(row)) for row in answers]
    right = [row + [pad] * (width - len(row)) for row in answers]
    right_mask = [[1] * len(row) + [0] * (width - len(row)) for row in answers]
    left, left_mask = _pad_left(prompts, pad)
    ids = torch.cat([left, torch.tensor(right)], dim=1)
    mask = torch.cat([left_mask, torch.tensor(right_mask)], dim=1)
    # Left padding must not shift the words: positions count from each row's first real token.
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return Batch({k: v.to(device) for k, v in inputs.items()}, torch.tensor(labels).to(device))


def make_prompts(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], device: torch.device
) -> dict[str, Tensor]:
    """The prompts alone, as ``generate`` takes them."""
    rows = [encode_prompt(tokenizer, example) for example in examples]
    ids, mask = _pad_left(rows, tokenizer.pad_token_id)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def answer_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits that predict each column of ``batch.labels``: (rows, answer columns, vocabulary)."""
    end = batch.inputs["input_ids"].shape[1]
    # One column earlier: the last prompt token predicts the first answer token. Indices, where a
    # count would do, because a slice is not contiguous, and torch then multiplies row by row.
    columns = torch.arange(end - batch.labels.shape[1] - 1, end - 1, device=batch.labels.device)
    return model(**batch.inputs, logits_to_keep=columns).logits


def answer_loss(model: nn.Module, batch: Batch, reduction: str = "mean") -> Tensor:
    """Cross entropy over the answer tokens, end-of-text included, prompt and padding excluded."""
    logits = answer_logits(model, batch).flatten(0, 1).float()
    labels = batch.labels.flatten()
    return F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction=reduction)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[int]:
    """Ids of ``prompt ->``, begun as this tokenizer begins a text."""
    ids = tokenizer(f"{example.prompt} ->", add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    begins_with_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return [bos, *ids] if begins_with_bos else ids


def encode_answer(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[int]:
    """Ids of `` answer`` and the end-of-text token; made apart, so that the border is exact."""
    ids = tokenizer(f" {example.answer}", add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def _pad_left(rows: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
