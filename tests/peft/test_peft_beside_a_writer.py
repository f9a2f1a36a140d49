"""A reader beside a process that saves: one save's configuration and tensors, or an error."""

import contextlib
import itertools
import os
import shutil
import signal
from collections import Counter

import pytest
import torch
from cli_helpers import llama, run, with_adapter
from peft_helpers import accelerated, made, opened
from safetensors.torch import load_file

LOADS = 60  # of each door; more by hand: `beside_a_writer(tmp_path, door, 2000)`
OTHER = {"key": {"projection_prng_key": 2, "randlora_alpha": 50}, "alpha": {"randlora_alpha": 50}}


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


def from_pretrained(folder, model, x):
    return opened(folder)(x)


def new(folder, model, x):
    model.load_adapter(folder, "new")
    model.set_adapter("new")
    try:
        return model(x)
    finally:
        model.delete_adapter("new")


def over(folder, model, x):
    model.load_adapter(folder, "default")
    return model(x)


def hotswap(folder, model, x):
    accelerated.hotswap_adapter(model, folder)
    return model(x)


# What differs between the adapters. `hotswap` and `over` want the same bases.
DOORS = {from_pretrained: "key", new: "key", over: "key", hotswap: "alpha"}


def beside_a_writer(folder, door, loads):
    """How often each save was loaded, or none; AssertionError if parts of two were."""
    options = {"basis": "hadamard", "randlora_alpha": 100}
    models = [made(seed=1, **options), made(seed=2, **options | OTHER[DOORS[door]])]
    reader, x = made(seed=1, **options), torch.randn(6, 24)
    with torch.no_grad():
        wanted = [model(x) for model in models]
        models[0].save_pretrained(folder)
        seen = Counter()
        with saving(folder, models):
            for _ in range(loads):
                try:
                    y = door(folder, reader, x)
                except ValueError as error:
                    assert "does not belong" in str(error) or "does not fit" in str(error)
                    seen["refused"] += 1
                    continue
                (which,) = [i for i, want in enumerate(wanted) if torch.equal(y, want)] or ["mixed"]
                seen[which] += 1
    assert not seen["mixed"], seen
    return seen


@pytest.mark.filterwarnings("ignore:randlora_alpha of")
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_no_load_is_mixed(tmp_path, door):
    seen = beside_a_writer(tmp_path, door, LOADS)
    assert seen[0] and (seen[1] or door is over), seen


def merges_beside_a_writer(folder, merges):
    base, seen = folder / "base", Counter()
    llama().save_pretrained(base)
    options = {"basis": "hadamard", "targets": ["q_proj"]}
    models = [
        with_adapter(
            llama(), seed=seed, projection_prng_key=seed, randlora_alpha=90 * seed, **options
        )
        for seed in (1, 2)
    ]
    wanted = []
    for model in models:
        model.save_pretrained(folder / "adapter")
        assert run("merge", base, folder / "adapter", folder / "out")[0] == 0
        wanted.append(load_file(folder / "out/model.safetensors"))
        shutil.rmtree(folder / "out")
    with saving(folder / "adapter", models):
        for _ in range(merges):
            code, _, error = run("merge", base, folder / "adapter", folder / "out")
            if code:
                assert "does not belong" in error, error
                seen["refused"] += 1
                continue
            made = load_file(folder / "out/model.safetensors")
            same = [all(torch.equal(made[k], each[k]) for k in made) for each in wanted]
            seen[same.index(True) if any(same) else "mixed"] += 1
            shutil.rmtree(folder / "out")
    assert not seen["mixed"], seen
    return seen


def test_no_merge_is_mixed(tmp_path):
    seen = merges_beside_a_writer(tmp_path, LOADS // 2)
    assert seen[0] and seen[1], seen
