"""Trainings of toy models by transformers' Trainer, with `ForgettingBudget`."""

import logging

import peft
import torch
import transformers
from language_models import llama
from peft_helpers import adapted, randomize

from randlora_ext import ForgettingBudget

ROWS = [{"input_ids": row, "labels": row} for row in torch.arange(96).view(16, 6) % 50]
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 3e-4}


def base(**options):
    return llama(initializer_range=0.1, **options)


def model(**options):
    options = {"basis": "hadamard", "randlora_alpha": 80, "task_type": "CAUSAL_LM"} | options
    return randomize(adapted(base(), ["q_proj", "down_proj"], r=4, **options), size=0)


def lora():
    torch.manual_seed(0)
    return peft.get_peft_model(base(), peft.LoraConfig(r=4, target_modules=["down_proj"]))


def trainer(model, folder, rows=ROWS, cls=transformers.Trainer, budget=(), **options):
    """With the callback unless `budget` is None; with an evaluation set if it evaluates."""
    options = {"max_steps": 3, "save_steps": 2, "per_device_train_batch_size": 2} | options
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 1}
    settings = transformers.TrainingArguments(str(folder), **quiet, **options)
    held_out = ROWS[:4] if settings.eval_strategy != "no" else None
    run = cls(model, settings, train_dataset=rows, eval_dataset=held_out)
    if budget is not None:
        run.add_callback(ForgettingBudget(run, **dict(budget)))
    return run


def scales(model):
    state = model.state_dict()
    return {key: value for key, value in state.items() if "randlora_input_scale" in key}


def is_calibrated(model):
    return any(bool((scale != 1).any()) for scale in scales(model).values())


def told_by(run, caplog, **resume):
    """What is logged while it trains, as (level, message)."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "randlora_ext"):
        run.train(**resume)
    records = [each for each in caplog.records if each.name.startswith("randlora_ext")]
    return [(each.levelname, each.message) for each in records]


def logged(run, key):
    return [entry[key] for entry in run.state.log_history if key in entry]
