"""Fine-tuning with RandLoRA: PEFT makes the adapter, transformers' Trainer trains it.

``randlora_ext.peft.enable()`` is the only line that a program for stock PEFT does not have.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import randlora_ext.peft

from . import report
from .spelling import AnswerCollator, Example, read_examples, symbol_error_rate

ANSWERED = 32  # held-out examples that the model also answers


def run(trainer: Trainer, options: argparse.Namespace, began: float) -> int:
    """Train, compare before and after, save, reload and report. Returns the exit code."""
    trained, total = trainer.model.get_nb_trainable_parameters()
    asked = trainer.eval_dataset[:ANSWERED]
    results: dict[str, Any] = {
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "machine": {"device": str(trainer.args.device), "threads": torch.get_num_threads()}
        | {"torch": torch.__version__}
        | randlora_ext.build_info(),
        "parameters": {"trained": trained, "total": total},
        "prompts": [example.prompt for example in asked],
        "right_answers": [example.answer for example in asked],
    }
    try:
        results["before"] = evaluate(trainer, asked)
        train(trainer, options.out / "adapter", results)
        results["after"] = evaluate(trainer, asked)
        results["effective_rank"] = effective_ranks(trainer.model)
        results["reload_difference"] = reload_difference(trainer, options, asked)
    except KeyboardInterrupt:
        print("\ninterrupted; the report so far:", file=sys.stderr)
        results["interrupted"] = True
    results["total_seconds"] = time.perf_counter() - began
    report.write(results, options.out)
    print(report.summary(results, options.out))
    if "interrupted" in results:
        return 130
    learned = math.isfinite(results["after"]["held_out_loss"])
    if not learned:
        print("error: the loss is not finite; try a lower --lr", file=sys.stderr)
    return 0 if learned and results["reload_difference"] < 1e-3 else 1


def prepare(options: argparse.Namespace) -> Trainer:
    """Read the data, load the model, attach the adapter."""
    options.out.mkdir(parents=True, exist_ok=True)
    training, held_out = read_examples(options.data)
    print(f"data: {options.data}: {len(training):,} examples, and {len(held_out)} held out")
    print(f"model: {options.source}", flush=True)
    randlora_ext.peft.enable()  # the one line: RandLoRA models made from here on use our kernels
    config = randlora_ext.peft.RandLoraConfig(
        r=options.rank,
        randlora_alpha=20 * options.rank,  # dW is scaled by alpha / r = 20, as PEFT advises
        basis=options.basis,  # from the seed, so that the adapter's file holds no basis
        density=options.density,
        projection_prng_key=options.seed,
        target_modules=options.target_modules,
        task_type="CAUSAL_LM",
    )
    arguments = TrainingArguments(
        output_dir=str(options.out),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=32,
        learning_rate=options.lr,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        logging_steps=1,
        logging_nan_inf_filter=False,
        label_names=["labels"],
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to=[],
        seed=options.seed,
        use_cpu=options.cpu,
    )
    trainer = Trainer(
        model=get_peft_model(load_base(options.source), config),
        args=arguments,
        data_collator=AnswerCollator(load_tokenizer(options.source)),
        train_dataset=training,
        eval_dataset=held_out,
    )
    trainer.remove_callback(transformers.ProgressCallback)
    trainer.add_callback(LossInBar)
    return trainer


def evaluate(trainer: Trainer, asked: Sequence[Example]) -> dict[str, Any]:
    """The held-out loss, the answers to ``asked``, and how right they are."""
    right = [example.answer for example in asked]
    given = answers(trainer.model, trainer.data_collator.tokenizer, asked)
    return {
        "held_out_loss": trainer.evaluate()["eval_loss"],
        "exact_answers": sum(map(str.__eq__, given, right)),
        "symbol_error_rate": symbol_error_rate(right, given),
        "answers": given,
    }


def train(trainer: Trainer, folder: Path, results: dict[str, Any]) -> None:
    """Train and save the adapter. Ctrl-C passes through; what had been learned is saved."""
    began = time.perf_counter()
    try:
        trainer.train()
    finally:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        if losses:
            results["train_loss"] = losses
            results["seconds_per_step"] = (time.perf_counter() - began) / len(losses)
            results["kernels"] = randlora_ext.peft.kernel_summary(trainer.model)
            # "auto" would ask the hub whether the embeddings were resized.
            trainer.model.save_pretrained(folder, save_embedding_layers=False)
            results["adapter_bytes"] = (folder / "adapter_model.safetensors").stat().st_size


@torch.no_grad()
def effective_ranks(model: PeftModel) -> dict[str, list[float]]:
    """By the last part of layers' names: the mean effective rank of dW, and min(in, out).

    If layers of a name have several sizes, the mean of these.
    """
    found: dict[str, list[tuple[float, int]]] = {}
    for path, layer in model.named_modules():
        if hasattr(layer, "randlora_lambda") and hasattr(layer, "get_delta_weight"):
            delta = layer.get_delta_weight("default")
            pair = effective_rank(delta), min(delta.shape)
            found.setdefault(path.rpartition(".")[2], []).append(pair)
    return {
        name: [statistics.fmean(each) for each in zip(*pairs, strict=True)]
        for name, pairs in found.items()
    }


def effective_rank(matrix: torch.Tensor) -> float:
    """exp of the entropy of the squared singular values: how many of them count; 0 if all are 0."""
    energy = torch.linalg.svdvals(matrix.float()).square()
    if not energy.any():
        return 0.0
    return float(torch.special.entr(energy / energy.sum()).sum().exp())


@torch.no_grad()
def reload_difference(
    trainer: Trainer, options: argparse.Namespace, examples: Sequence[Example]
) -> float:
    """Largest difference of a logit once the saved adapter is on a fresh base model."""
    device = trainer.model.device
    fresh = PeftModel.from_pretrained(load_base(options.source), options.out / "adapter").to(device)
    batch = trainer.data_collator(examples).to(device)
    logits = [model.eval()(**batch).logits for model in (trainer.model, fresh)]
    return float((logits[0] - logits[1]).abs().max())


@torch.no_grad()
def answers(
    model: PeftModel, tokenizer: transformers.PreTrainedTokenizerBase, examples: Sequence[Example]
) -> list[str]:
    """The model's greedy answers, at most as long as the longest right one."""
    right = tokenizer([f" {example.answer}" for example in examples])["input_ids"]
    prompts = [f"{example.prompt} ->" for example in examples]
    inputs = tokenizer(prompts, padding=True, return_tensors="pt").to(model.device)
    output = model.eval().generate(
        **inputs,
        do_sample=False,
        max_new_tokens=max(map(len, right)) + 1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    new = output[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]


def load_tokenizer(name: str) -> transformers.PreTrainedTokenizerBase:
    """The model's tokenizer, set to pad on the left."""
    tokenizer = AutoTokenizer.from_pretrained(**_location(name), padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def load_base(name: str) -> transformers.PreTrainedModel:
    """The base model in float32."""
    location = _location(name)
    options: dict[str, Any] = {"dtype": torch.float32}
    if "gguf_file" in location and hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**location, **options)
    if "gguf_file" not in location:
        return model
    # transformers neither trains nor saves a model read from a GGUF file, unpacked or not; a model
    # made from its configuration and weights is a plain one.
    config, weights = model.config, model.state_dict()
    vars(config).pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(weights)
    return model


def save_base(options: argparse.Namespace) -> None:
    """Write the base model and its tokenizer to ``OUT/base`` as safetensors."""
    folder = options.out / "base"
    load_base(options.source).save_pretrained(folder)
    load_tokenizer(options.source).save_pretrained(folder)
    print(f"the base model is in {folder}")


class LossInBar(transformers.ProgressCallback):
    """Shows the loss beside the progress bar instead of printing a line for every step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")


def _location(name: str) -> dict[str, str]:
    """What ``from_pretrained`` is given: a folder or hub id, or a folder and its GGUF file."""
    if not name.endswith(".gguf"):
        return {"pretrained_model_name_or_path": name}
    return {"pretrained_model_name_or_path": str(Path(name).parent), "gguf_file": Path(name).name}
