"""What the models of finetune.py read: packed batches, and text that the base model wrote."""

from functools import cache

import spelling
import torch
from finetune_models import loaded
from finetune_tasks import PROMPTS, TEXTS
from spelling import NO_LABEL, Batch, plan_batches, tokenized

from randlora_ext.own_text import own_text

BATCH = 16
ANSWERED = 32  # prompts whose answers are compared; those to the others serve `calibrate`
ANSWER_TOKENS = 64
OWN_ROWS, OWN_TOKENS = 256, 64  # to mix in


def pack(tokenizer, examples: list, device="cpu") -> Batch:
    """`spelling.make_batch`, but with the examples behind one another in one row.

    An example may be a row of tokens already, as of `own_rows`.
    """
    rows = tokenized(tokenizer, [each for each in examples if isinstance(each, tuple)])
    rows += [each for each in examples if isinstance(each, dict)]
    ids = [token for row in rows for token in row["input_ids"]]
    labels = [label for row in rows for label in row["labels"]]
    positions = [place for row in rows for place in range(len(row["input_ids"]))]
    at = [place for place, label in enumerate(labels) if label != NO_LABEL]
    inputs = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}
    inputs["logits_to_keep"] = torch.tensor(at) - 1  # the column before each label predicts it
    inputs = {name: t.to(device) for name, t in inputs.items()}
    return Batch(inputs, torch.tensor([labels], device=device)[:, at])


def use_packed_batches() -> None:
    """In all of spelling.py, whose own batches are padded."""
    spelling.make_batch = pack
    spelling.answer_logits = lambda model, batch: model(**batch.inputs, use_cache=False).logits


def to_calibrate_with(on: str, batches: list[list], model: str) -> list[dict]:
    """What `calibrate` takes: of `on` batches of the task, four by default; or another text, or one
    that the model wrote. "long" is four batches, each read as one row from its first token on."""
    tokenizer, _ = loaded(model)
    if on == "own":
        return [{"input_ids": batch["input_ids"]} for batch in written(on, model)]
    if on in TEXTS:
        tokens = tokenizer(TEXTS[on]()[-8192:])["input_ids"][-512:]
        return [{"input_ids": torch.tensor([tokens])}]
    count = 4 if on in ("", "long") else int(on)
    names = ("input_ids",) if on == "long" else ("input_ids", "position_ids")
    packed = [pack(tokenizer, examples).inputs for examples in batches[:count]]
    return [{name: of[name] for name in names} for of in packed]


@cache
def written(text: str, model: str) -> list[dict]:
    """What the base model wrote, as batches of `own_text`.

    text: "own" from its first token; "compared" or "answers", to the first prompts or the others.
    """
    tokenizer, base = loaded(model)
    if text == "own":
        return own_text(base)
    prompts = {"compared": PROMPTS[:ANSWERED], "answers": PROMPTS[ANSWERED:]}[text]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    made = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)
    return own_text(base, tokens=ANSWER_TOKENS, prompts=made["input_ids"])


@cache
def own_rows(model: str) -> list[dict]:
    """Rows that the base model wrote, to mix in: not those that are measured on."""
    base, at_once = loaded(model)[1], 64
    batches = [
        batch
        for seed in range(1, 1 + OWN_ROWS // at_once)
        for batch in own_text(base, rows=at_once, tokens=OWN_TOKENS, seed=seed)
    ]
    return [
        {name: batch[name][0].tolist() for name in ("input_ids", "labels")} for batch in batches
    ]


def mixed(batches: list[list], mix: int, model: str, seed: int) -> list[list]:
    """One example of every `mix` of a batch is a row that the base model wrote."""
    share = BATCH // mix
    drawn = plan_batches(own_rows(model), len(batches), share, seed)
    return [batch[share:] + own for batch, own in zip(batches, drawn, strict=True)]
