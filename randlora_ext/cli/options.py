"""Which action was asked for, with which options."""

import argparse
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from .check import check
from .errors import CliError, first_line

# Options that belong to one action, or to several.
_BELONGS = {
    "base": ("inspect", "convert"),
    "layers": ("inspect",),
    "plot": ("inspect",),
    "to": ("convert",),
    "density": ("convert",),
    "rounding_seed": ("merge",),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the action; returns the exit code."""
    try:
        options = parse(arguments)
        action = next((a for a in ("inspect", "convert", "merge", "bench") if options[a]), None)
        if action is None:
            return check()
        return _run(action, options)
    except CliError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    except Exception as error:  # ours: a bug report needs the traceback
        traceback.print_exc()
        print(f"error: unexpected {type(error).__name__}; please report it", file=sys.stderr)
        return 2


def _run(action: str, options: dict) -> int:
    if action == "bench":
        _need("randlora_ext.peft", "--bench compares with PEFT")
        return import_module(".bench", __package__).bench()
    _need("randlora_ext.peft", f"--{action} reads adapters by PEFT")
    if action == "inspect":
        run = import_module(".inspection", __package__).inspect
        return run(options["inspect"], options["base"], options["layers"], options["plot"])
    if action == "convert":
        run = import_module(".convert", __package__).convert
        source, out = options["convert"]
        return run(source, out, options["to"], options["base"], options["density"])
    run = import_module(".merge", __package__).merge
    return run(*options["merge"], options["rounding_seed"])


def _need(module: str, why: str) -> None:
    try:
        import_module(module)
    except ImportError as error:
        raise CliError(f"{why}: {first_line(error)}") from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CliError(f"{message} (see --help)")


def parse(arguments: Sequence[str] | None) -> dict:
    """The options as a dictionary; CliError where they do not go together."""
    parser = _Parser(
        prog="python -m randlora_ext",
        description="Without an option: what a bug report needs, and a self-check of the kernels.",
        allow_abbrev=False,
    )
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument(
        "--inspect", metavar="ADAPTER", type=Path, help="tell what is in a saved adapter"
    )
    actions.add_argument(
        "--convert",
        nargs=2,
        metavar=("ADAPTER", "OUT"),
        type=Path,
        help="write an adapter with its bases, or without them; see --to",
    )
    actions.add_argument(
        "--merge",
        nargs=3,
        metavar=("MODEL", "ADAPTER", "OUT"),
        type=Path,
        help="add an adapter to the weights of a local model folder, file by file",
    )
    actions.add_argument(
        "--bench", action="store_true", help="a minute: frozen, LoRA, PEFT's RandLoRA and ours"
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="with --inspect, --convert: the base model, a folder or a name in the hub's cache, of "
        "which only shapes are read (default: the one that the adapter names)",
    )
    parser.add_argument(
        "--layers", metavar="REGEX", help="with --inspect: only layers whose path it is found in"
    )
    parser.add_argument(
        "--plot", metavar="PNG", type=Path, help="with --inspect: spectra of dW, and a heat map"
    )
    parser.add_argument(
        "--to",
        choices=("peft", "compact"),
        help="with --convert: peft, with bases, for stock PEFT; compact, lambda and gamma alone",
    )
    parser.add_argument(
        "--density",
        type=float,
        metavar="X",
        help="with --convert --to compact: of generated bases, where it cannot be told from them",
    )
    parser.add_argument(
        "--rounding-seed",
        type=int,
        metavar="N",
        help="with --merge: round 16-bit sums up or down at random, so that small changes count",
    )
    options = vars(parser.parse_args(arguments))
    for name, actions_of_it in _BELONGS.items():
        if options[name] is not None and not any(options[action] for action in actions_of_it):
            spelled = " or ".join(f"--{action}" for action in actions_of_it)
            parser.error(f"--{name.replace('_', '-')} goes with {spelled}")
    if options["convert"] and options["to"] is None:
        parser.error("--convert needs --to peft or --to compact")
    return options
