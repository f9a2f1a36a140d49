"""Examples, the held-out split, and the order in which training sees them.

Two file formats, told apart by name:

* ``*.dict``: a pronunciation dictionary, ``word PH PH PH`` a line. Words of 3 to 8 plain letters
  are kept, second pronunciations (``word(2)``) are not. The prompt is the word spelled out.
* anything else: ``prompt<TAB>answer`` a line, both used as they are.

Either way the model reads ``prompt ->`` and learns to go on with `` answer`` and its end token.

The word is spelled out because a subword tokenizer hides the letters: "hello" is a single token,
whose spelling the model would have to know by heart. Spelled out, every letter is one token, seen
in nearly every batch, and 60 steps are enough to learn what it sounds like.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import DemoError

_PLAIN_WORD = re.compile(r"[a-z]{3,8}")


@dataclass(frozen=True)
class Example:
    """One line of data. ``name`` is what tables show; ``prompt`` is what the model reads."""

    name: str
    prompt: str
    answer: str


def read_examples(path: Path) -> list[Example]:
    """Read a dictionary or a TSV (see the module's text). The first of repeated prompts wins."""
    parse = _parse_dictionary_line if path.suffix == ".dict" else _parse_tsv_line
    examples: dict[str, Example] = {}
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                line = line.rstrip("\r\n")
                if not line.strip() or line.startswith(";;;"):
                    continue
                example = parse(line, f"--data {path}, line {number}")
                if example is not None:
                    examples.setdefault(example.prompt, example)
    except UnicodeDecodeError as error:
        raise DemoError(f"--data {path}: not UTF-8 text ({error.reason})") from error
    if len(examples) < 2:
        raise DemoError(f"--data {path}: {len(examples)} usable example(s), at least 2 are needed")
    return list(examples.values())


def split_examples(
    examples: Sequence[Example], held_out: int = 128
) -> tuple[list[Example], list[Example]]:
    """Split into (train, held out): ``held_out`` examples, but at most a tenth and at least one.

    The order is that of a hash of the prompt, so the split depends on no seed and on no file order.
    """
    ordered = sorted(examples, key=lambda example: _hash(example.prompt))
    count = max(1, min(held_out, len(ordered) // 10))
    return ordered[count:], ordered[:count]


def plan_batches(
    examples: Sequence[Example], steps: int, batch_size: int, seed: int
) -> list[list[Example]]:
    """``steps`` random batches of ``batch_size``; none comes twice before all have come once.

    Batches of equal lengths need a fifth fewer tokens, but learned less a step.
    """
    order = random.Random(seed)
    drawn: list[Example] = []
    while len(drawn) < steps * batch_size:
        drawn += order.sample(examples, len(examples))
    return [drawn[i * batch_size : (i + 1) * batch_size] for i in range(steps)]


def _parse_dictionary_line(line: str, where: str) -> Example | None:
    word, *phonemes = line.split()
    word = word.lower()
    if not phonemes:
        raise DemoError(f"{where}: expected 'word PH PH ...', got {line!r}")
    if not _PLAIN_WORD.fullmatch(word):
        return None
    return Example(word, " ".join(word), " ".join(phonemes))


def _parse_tsv_line(line: str, where: str) -> Example:
    prompt, tab, answer = (part.strip() or part for part in line.partition("\t"))
    if not (prompt and tab and answer):
        raise DemoError(
            f"{where}: expected 'prompt<TAB>answer', got {line[:60]!r} "
            "(a pronunciation dictionary must be named *.dict)"
        )
    return Example(prompt, prompt, answer)


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
