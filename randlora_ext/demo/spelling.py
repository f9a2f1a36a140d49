"""The task: from the letters of a word to its phonemes, or from any prompt to its answer.

The model reads ``c a t ->`` and learns to continue with `` K AE T`` and the end-of-text token.
Words are spelled out because a tokenizer hides the letters of "cat", which it reads as one token.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import BatchEncoding, DataCollatorForSeq2Seq, PreTrainedTokenizerBase


class Example(NamedTuple):
    prompt: str
    answer: str


def read_examples(path: Path) -> tuple[list[Example], list[Example]]:
    """Read a dictionary (``*.dict``) or lines of ``prompt<TAB>answer``.

    From a dictionary, words of 3 to 8 plain letters are used, with their first pronunciation.

    Returns:
        The examples to train on, and those held out: 128, but at most a tenth. No prompt is in
        both, and the split is always the same.

    Raises:
        ValueError: a line has no answer, or there are fewer than two examples.
    """
    answers: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        prompt, _, answer = line.partition("\t")
        if path.suffix == ".dict":
            word, *phonemes = line.split() or [""]
            if not re.fullmatch("[a-z]{3,8}", word.lower()):
                continue
            prompt, answer = " ".join(word.lower()), " ".join(phonemes)
        if not answer.strip():
            raise ValueError(f"{path}, line {number}: there is no answer in {line[:60]!r}")
        answers.setdefault(prompt.strip(), answer.strip())
    if len(answers) < 2:
        raise ValueError(f"{path}: at least 2 examples are needed, found {len(answers)}")
    examples = [Example(*pair) for pair in answers.items()]
    random.Random(0).shuffle(examples)
    held_out = max(1, min(128, len(examples) // 10))
    return examples[held_out:], examples[:held_out]


class AnswerCollator:
    """Turns examples into a batch; only answers and their end-of-text token have labels.

    Padding is on the left, so all answers end in the last column. ``logits_to_keep`` then spares
    the model the prompts' logits, a tenth of a step with 49,152 words to choose from.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._pad = DataCollatorForSeq2Seq(tokenizer)

    def __call__(self, examples: Sequence[Example]) -> BatchEncoding:
        rows = []
        for example in examples:
            prompt = self.tokenizer(f"{example.prompt} ->")["input_ids"]
            answer = self.tokenizer(f" {example.answer}", add_special_tokens=False)["input_ids"]
            answer = [*answer, self.tokenizer.eos_token_id]
            labels = [-100] * len(prompt) + answer
            rows.append({"input_ids": prompt + answer, "labels": labels})
        batch = self._pad(rows)
        # The longest answer, and the prompt's last token, which predicts its first.
        kept = torch.arange(-int((batch["labels"] != -100).sum(dim=1).max()) - 1, 0)
        batch["labels"], batch["logits_to_keep"] = batch["labels"][:, kept], kept
        return batch


def symbol_error_rate(right: Sequence[str], answers: Sequence[str]) -> float:
    """Symbols (here phonemes) to insert, delete or replace, per symbol of the right answers."""
    edits = sum(_edits(r.split(), a.split()) for r, a in zip(right, answers, strict=True))
    return edits / sum(len(text.split()) for text in right)


def _edits(right: list[str], answer: list[str]) -> int:
    """Levenshtein distance, a row of its table at a time."""
    row = list(range(len(answer) + 1))
    for i, symbol in enumerate(right, start=1):
        above, row[0] = row[0], i
        for j, other in enumerate(answer, start=1):
            above, row[j] = row[j], min(above + (symbol != other), row[j] + 1, row[j - 1] + 1)
    return row[-1]
