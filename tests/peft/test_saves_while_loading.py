"""One process saves while another one loads: each load is of one save, or refused."""

import contextlib
import itertools
import os
import shutil
import signal
from collections import Counter

import pytest
import torch
from language_models import llama
from peft_helpers import (
    accelerated,
    made,
    opened,
)
from safetensors.torch import load_file

LOADS = 60  # of each door


@contextlib.contextmanager
def saving(folder, models):
    """Another process saves one model after the other, until the block ends."""
    if not (child := os.fork()):
        try:
            signal.alarm(600)
            for model in itertools.cycle(models):
                model.save_pretrained(folder)
        finally:
            os._exit(1)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def anew(folder, model, x):
    return opened(folder)(x)


def new(folder, model, x):
    if "new" in model.peft_config:
        model.delete_adapter("new")
    model.load_adapter(folder, "new")
    model.set_adapter("new")
    return model(x)


def over(folder, model, x):
    model.load_adapter(folder, "default")
    return model(x)


def hotswap(folder, model, x):
    accelerated.hotswap_adapter(model, folder)
    return model(x)


def merge(folder, model, x):
    """By the command line, without a model."""
    code, _, error = run("merge", folder / "base", folder, folder / "out")
    if code:
        raise ValueError(error)
    merged = load_file(folder / "out/model.safetensors")
    shutil.rmtree(folder / "out")
    return torch.cat([tensor.flatten() for tensor in merged.values()])


# What differs between the adapters: hotswap wants the same bases.
KEY = {"projection_prng_key": 2, "randlora_alpha": 50}
DOORS = {anew: KEY, new: KEY, over: KEY, hotswap: {"randlora_alpha": 50}, merge: KEY}


@pytest.mark.filterwarnings("ignore:randlora_alpha of")
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
@torch.no_grad()
def test_no_load_is_mixed(tmp_path, door):
    options, x = {"basis": "hadamard", "randlora_alpha": 100}, torch.randn(6, 24)
    if door is merge:
        options |= {"base": llama, "targets": ["q_proj"]}
        llama().save_pretrained(tmp_path / "base")
    models = [made(1, **options), made(2, **options | DOORS[door])]
    reader, wanted, seen = made(1, **options), [], Counter()
    for model in models:
        model.save_pretrained(tmp_path)
        wanted.append(merge(tmp_path, model, x) if door is merge else model(x))
    models[0].save_pretrained(tmp_path)
    with saving(tmp_path, models):
        for _ in range(LOADS // 2 if door is merge else LOADS):
            try:
                y = door(tmp_path, reader, x)
            except (ValueError, RuntimeError) as error:
                # The last one is of safetensors, which opens a file twice.
                told = "save the adapter again", "does not fit", "required mapping size"
                assert any(words in str(error) for words in told), error
                seen["refused"] += 1
                continue
            (which,) = [i for i, want in enumerate(wanted) if torch.equal(y, want)] or ["mixed"]
            seen[which] += 1
    assert seen[0] and (seen[1] or door is over) and not seen["mixed"], seen
