"""Run by test_killed_saves.py: processes that are killed in the middle of a save; prints counts.

    python tests/peft/killed_saves_program.py STEP TRIALS

A forked child saves a second version of an adapter over the first and is killed at a line of Python
in PEFT, transformers, huggingface_hub, safetensors or ours: at every STEP-th of those that the save
runs through. Then a child is killed TRIALS times at a random moment of writing 40 MB. Whatever is
there afterwards has to be complete, all of the first version or all of the second.
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft_helpers import Deep, accelerated, deep_config, made, peft, randomize
from safetensors.torch import load_file, save_file

WEIGHTS, PICKLE, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"
WATCHED = ("peft", "randlora_ext", "safetensors", "huggingface_hub", "transformers", "tempfile")
WATCHED += ("serialization",)  # torch.save's file


def killed_at(line: int, save) -> int | None:
    """Forks a child that saves and dies at that line; the child's number of lines if it did not."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        seen = 0

        def trace(frame, event, argument):
            nonlocal seen
            parts = Path(frame.f_code.co_filename).parts
            if not any(part.removesuffix(".py") in WATCHED for part in parts):
                return None
            if event == "line":
                if seen == line:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1
            return trace

        sys.settrace(trace)
        save()
        sys.settrace(None)
        os.write(write, str(seen).encode())
        os._exit(0)
    os.close(write)
    _, status = os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    assert os.WIFSIGNALED(status) or text, f"the save failed: {status}"
    return int(text) if text else None


def tensors(folder: Path) -> dict:
    pickle = folder / PICKLE
    return torch.load(pickle) if pickle.exists() else load_file(folder / WEIGHTS)


def version_of(folder: Path, states: list[dict], configs: list[str]) -> int:
    """0 or 1; fails where the files are neither."""
    config = (folder / CONFIG).read_text()
    assert json.loads(config) is not None and config in configs
    state = tensors(folder)
    for version, known in enumerate(states):
        if known.keys() == state.keys() and all(torch.equal(known[k], state[k]) for k in state):
            return version
    raise AssertionError("neither the old nor the new")


def at_every_line(save, model, step: int) -> dict:
    """Kills `save(folder)` of a changed model at every `step`-th line."""
    with tempfile.TemporaryDirectory() as scratch:
        first, second, folder = (Path(scratch) / name for name in ("first", "second", "folder"))
        randomize(model, 4)
        save(first)
        randomize(model, 5)
        save(second)
        states = [tensors(f) for f in (first, second)]
        configs = [(f / CONFIG).read_text() for f in (first, second)]
        lines = killed_at(-1, lambda: save(second))
        found = [0, 0]
        for line in range(0, lines, step):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(first, folder)
            assert killed_at(line, lambda: save(folder)) is None
            found[version_of(folder, states, configs)] += 1
        assert found[0], found
        save(folder)  # what a killed save left does not stand in the way of the next
        assert version_of(folder, states, configs) == 1
        return {"lines": lines, "killed": sum(found), "old": found[0], "new": found[1]}


def while_writing(trials: int) -> dict:
    """Kills at random moments a child that writes one version after the other."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        states = [{"a": torch.full((10_000_000,), float(v))} for v in range(2)]
        save_file(states[0], folder / WEIGHTS)
        (folder / CONFIG).write_text("{}")
        found = [0, 0]
        for _ in range(trials):
            child = os.fork()
            if child == 0:
                while True:
                    for state in states[::-1]:
                        save_file(state, folder / WEIGHTS)
            time.sleep(random.uniform(0.01, 0.15))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            found[version_of(folder, states, ["{}"])] += 1
            for unfinished in folder.glob(".tmp*"):
                unfinished.unlink()
        return {"killed": sum(found), "old": found[0], "new": found[1]}


def main() -> None:
    step, trials = map(int, sys.argv[1:])
    torch.set_num_threads(1)  # the children have no other
    random.seed(0)
    peft_s, ours = (
        made(density=0.2, basis=basis, save_projection=False) for basis in ("peft", "independent")
    )
    plain = randomize(peft.get_peft_model(Deep(), deep_config(5, save_projection=False)))
    saves = {
        "save_pretrained, peft": (peft_s, peft_s.save_pretrained),
        "save_pretrained, independent": (ours, ours.save_pretrained),
        "export_to_peft": (ours, lambda folder: accelerated.export_to_peft(ours, folder)),
        "a pickle and PEFT's own configuration": (
            plain, lambda folder: plain.save_pretrained(folder, safe_serialization=False),
        ),
    }  # fmt: skip
    for name, (model, save) in saves.items():
        print(json.dumps([name, at_every_line(save, model, step)]))
    print(json.dumps(["40 MB", while_writing(trials)]))


if __name__ == "__main__":
    main()
