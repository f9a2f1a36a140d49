"""One process saves while another one loads: each load is of one save, or refused."""

import contextlib
import itertools
import os
import signal
import time
from collections import Counter

import pytest
import torch
from peft_helpers import made, opened

LOADS = 60  # of each door


@contextlib.contextmanager
def saving(folder, models):
    """Another process saves one model after the other, until the block ends, maybe in a save."""
    if not (child := os.fork()):
        try:
            signal.alarm(600)
            for model in itertools.cycle(models):
                model.save_pretrained(folder)
                time.sleep(0.02)
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


# Parts of what is told: by us, by json of a configuration that is being written, by safetensors,
# which opens a file twice.
TOLD = "does not fit", "is damaged", "Expecting value", "required mapping size"


@pytest.mark.filterwarnings("ignore:(randlora_alpha of|the tensors fit)")
@pytest.mark.parametrize("door", [anew, new, over], ids=lambda door: door.__name__)
@torch.no_grad()
def test_no_load_is_mixed(tmp_path, door):
    options, x = {"basis": "hadamard", "randlora_alpha": 100}, torch.randn(6, 24)
    other = {"projection_prng_key": 2, "randlora_alpha": 50}
    models = [made(1, **options), made(2, **options | other)]
    wanted, seen = [model(x) for model in models], Counter()
    reader = made(1, **options)
    models[0].save_pretrained(tmp_path)
    with saving(tmp_path, models):
        for _ in range(LOADS):
            try:
                y = door(tmp_path, reader, x)
            except (ValueError, RuntimeError, OSError) as error:
                assert any(words in str(error) for words in TOLD), error
                seen["refused"] += 1
                continue
            (which,) = [i for i, want in enumerate(wanted) if torch.equal(y, want)] or ["mixed"]
            seen[which] += 1
    assert not seen["mixed"], seen
    for which in (0,) if door is over else (0, 1):  # a complete save opens
        models[which].save_pretrained(tmp_path)
        assert torch.equal(door(tmp_path, reader, x), wanted[which])
