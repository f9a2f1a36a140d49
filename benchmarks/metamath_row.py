"""Prepares a row of PEFT's MetaMathQA comparison: metamath.py copies this file there."""

import randlora_ext.peft

BATCHES, SIZE = 16, 4

randlora_ext.peft.enable()  # before the row's configuration is read


def preprocess(model, tokenizer, rows) -> None:
    """Calibrates the model on the first 64 training examples, some 10,000 tokens."""
    batches = []
    for start in range(0, BATCHES * SIZE, SIZE):
        texts = {name: rows[start : start + SIZE][name] for name in ("input_ids", "attention_mask")}
        batch = tokenizer.pad(texts, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batches.append({**batch, "labels": labels})
    randlora_ext.calibrate(model, batches)
