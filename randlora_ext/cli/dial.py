"""``randlora dial``: what an adapter times a factor has learned and forgotten, and setting one."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..dial import FACTORS, NO_LABEL, dial_curve, set_dial
from . import CliError, errors_about

ROWS, COLUMNS = 8, 512  # of a batch, at most


def dial(
    model: Path,
    source: Path,
    task: Path | None,
    text: Path | None,
    tokens: int,
    plot: Path | None,
    factor: float | None,
    out: Path | None,
) -> int:
    """Prints `dial_curve` of a causal language model. With a factor it only writes a new adapter,
    by `set_dial`.

    A file that ends in .jsonl holds an object a line, with "prompt" and "completion", of which the
    loss is that of the completion, or with "text". Any other file is one text, cut into blocks.
    """
    if (factor is None) != (out is None):
        raise CliError("--set and --out go together: the factor, and the folder for the adapter")
    if factor is not None and out is not None:
        if not (task is text is plot is None):
            raise CliError(
                "--set measures nothing, so it goes without --task, --text and --plot; measure "
                "first, without --set"
            )
        return _set(model, source, factor, out)
    if task is None or text is None:
        raise CliError(
            "--task and --text must both be given, to measure, or --set and --out, to set a factor"
        )
    return _measure(model, source, task, text, tokens, plot)


def _measure(
    model: Path, source: Path, task: Path, text: Path, tokens: int, plot: Path | None
) -> int:
    if tokens < 1:
        raise CliError(f"--tokens must be at least 1, got {tokens}")
    import transformers

    with errors_about(model, (OSError, ValueError)):
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True)
        of_task, of_text = (_batches(file, tokenizer, tokens) for file in (task, text))
    adapted = _opened(model, source)
    adapted.to("cuda" if torch.cuda.is_available() else "cpu")
    print(f"measuring {len(FACTORS)} factors, some minutes on a CPU", file=sys.stderr)
    dial_curve(adapted, of_task, of_text, plot=plot)
    return 0


def _set(model: Path, source: Path, factor: float, out: Path) -> int:
    if not 0 < factor < float("inf"):
        raise CliError(f"--set must be a positive finite number, got {factor}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CliError(f"{out} exists; choose another name or remove it first")
    adapted = _opened(model, source)
    set_dial(adapted, factor)
    adapted.save_pretrained(out)
    print(f"{out} holds the adapter times {factor:g}")
    return 0


def _opened(model: Path, source: Path) -> Any:
    """The causal language model with its adapter, on the CPU. CliError if it is not RandLoRA's."""
    import peft
    import transformers

    import randlora_ext.peft

    with errors_about(model, (OSError, ValueError)):
        base = transformers.AutoModelForCausalLM.from_pretrained(model, local_files_only=True)
    randlora_ext.peft.enable()
    with errors_about(source, (OSError, ValueError, TypeError, RuntimeError)):
        adapted = peft.PeftModel.from_pretrained(base, source)
    if not isinstance(adapted.peft_config["default"], peft.RandLoraConfig):
        raise CliError(f"{source} must be a RandLoRA adapter")
    return adapted


def _batches(file: Path, tokenizer: Any, tokens: int) -> list[dict[str, Tensor]]:
    """At most that many tokens of the file, and a row more."""
    with errors_about(file, (OSError, ValueError)):
        written = file.read_text(encoding="utf-8")
        rows, count = [], 0
        for ids, prompt in _rows(file, written, tokenizer, tokens):
            if count < tokens and len(ids) > max(prompt, 1):
                rows.append((ids[:COLUMNS], prompt))
                count += len(ids)
        if not rows:
            raise ValueError("must hold text, or lines of JSON if it ends in .jsonl; it is empty")
    return [_padded(rows[start : start + ROWS]) for start in range(0, len(rows), ROWS)]


def _rows(file: Path, written: str, tokenizer: Any, tokens: int) -> Iterator[tuple[list[int], int]]:
    """(numbers of tokens, how many of them are the prompt)."""
    if file.suffix != ".jsonl":
        begin = [tokenizer.bos_token_id]
        if tokenizer("a")["input_ids"][:1] != begin:  # the model does not begin with it
            begin = []
        ids = tokenizer(written[: 16 * tokens], add_special_tokens=False)["input_ids"]
        step = COLUMNS - len(begin)
        for start in range(0, len(ids), step):
            yield begin + ids[start : start + step], 0
        return
    for number, line in enumerate(written.splitlines(), start=1):
        if not line.strip():
            continue
        row = json.loads(line)
        keys = row.keys() if isinstance(row, dict) else ()
        if "text" in keys:
            yield tokenizer(row["text"])["input_ids"], 0
        elif "prompt" in keys and "completion" in keys:
            prompt = tokenizer(row["prompt"])["input_ids"]
            whole = tokenizer(row["prompt"] + row["completion"])["input_ids"]
            end = tokenizer.eos_token_id
            yield whole + ([] if end is None else [end]), len(prompt)
        else:
            raise ValueError(
                f'line {number} must hold "prompt" and "completion", or "text", got {line[:60]!r}'
            )


def _padded(rows: list[tuple[list[int], int]]) -> dict[str, Tensor]:
    shape = len(rows), max(len(ids) for ids, _ in rows)
    inputs, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, NO_LABEL)
    for row, (ids, prompt) in enumerate(rows):
        inputs[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = 1
        labels[row, prompt : len(ids)] = torch.tensor(ids[prompt:])
    return {"input_ids": inputs, "attention_mask": mask, "labels": labels}
