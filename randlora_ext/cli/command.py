"""Which action was asked for, with which options."""

import argparse
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from .. import diagnostics
from .files import CliError, first_line

_ACTIONS = {
    "inspect": ("ADAPTER", "tell what is in a saved adapter"),
    "convert": ("ADAPTER OUT", "write an adapter with its bases, or without them; see --to"),
    "merge": (
        "MODEL ADAPTER OUT",
        "add an adapter to the weights of a local model folder, file by file",
    ),
    "bench": ("", "a minute: frozen, LoRA, PEFT's RandLoRA and ours"),
}
# The actions that take an option, what argparse is to know of it, and its help.
_OPTIONS: dict[str, tuple[tuple[str, ...], dict, str]] = {
    "base": (
        ("inspect", "convert"),
        {"metavar": "MODEL"},
        "the base model, a folder or a name in the hub's cache, of which only shapes are read "
        "(default: the one that the adapter names)",
    ),
    "layers": (("inspect",), {"metavar": "REGEX"}, "only layers whose path it is found in"),
    "plot": (("inspect",), {"metavar": "PNG", "type": Path}, "spectra of dW, and a heat map"),
    "to": (
        ("convert",),
        {"choices": ("peft", "compact")},
        "peft, with bases, for stock PEFT; compact, lambda and gamma alone",
    ),
    "density": (
        ("convert",),
        {"metavar": "X", "type": float},
        "with --to compact: of generated bases, if it cannot be told from them",
    ),
    "rounding_seed": (
        ("merge",),
        {"metavar": "N", "type": int},
        "round 16-bit sums up or down at random, so that small changes count",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the action; returns the exit code."""
    try:
        options = _parse(arguments)
        action = next((name for name in _ACTIONS if options[name]), None)
        return _check() if action is None else _run(action, options)
    except (CliError, OSError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    except Exception as error:  # ours: a bug report needs the traceback
        traceback.print_exc()
        print(f"error: unexpected {type(error).__name__}; please report it", file=sys.stderr)
        return 2


def _check() -> int:
    """Prints the report for bugs and the self-check; 1 if a check fails or cannot run."""
    print("\n".join(diagnostics.describe()))
    print("self-check, relative error against the float64 reference (limit):")
    try:
        checks = diagnostics.self_check()
    except Exception:
        traceback.print_exc()
        print("verdict: FAILED, the check could not run")
        return 1
    wrong = [what for what, error, limit in checks if not error <= limit]
    for what, error, limit in checks:
        print(f"  {what:28} {error:8.1e} ({limit:.0e}){'  WRONG' if what in wrong else ''}")
    print(f"verdict: {'FAILED: ' + ', '.join(wrong) if wrong else 'all is well'}")
    return 1 if wrong else 0


def _run(action: str, options: dict) -> int:
    operands = options[action] if isinstance(options[action], list) else [options[action]]
    more = {name: options[name] for name, (belongs, _, _) in _OPTIONS.items() if action in belongs}
    try:
        run = getattr(import_module(f".{action}", __package__), action)
        return run(**more) if action == "bench" else run(*operands, **more)
    except ImportError as error:
        raise CliError(
            f"--{action} needs another package: {first_line(error)}; "
            'pip install "randlora-ext[peft]" brings all'
        ) from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CliError(f"{message} (see --help)")


def _parse(arguments: Sequence[str] | None) -> dict:
    parser = _Parser(
        prog="python -m randlora_ext",
        description="Without an option: what a bug report needs, and a self-check of the kernels.",
        allow_abbrev=False,
    )
    actions = parser.add_mutually_exclusive_group()
    for name, (operands, told) in _ACTIONS.items():
        names = tuple(operands.split())
        more: dict = {"metavar": names, "nargs": len(names), "type": Path}
        if len(names) == 1:
            more = {"metavar": names[0], "type": Path}
        actions.add_argument(f"--{name}", help=told, **more if names else {"action": "store_true"})
    for name, (belongs, more, told) in _OPTIONS.items():
        spelled = " or ".join(f"--{action}" for action in belongs)
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, help=f"with {spelled}: {told}", **more)
    options = vars(parser.parse_args(arguments))
    for name, (belongs, _, _) in _OPTIONS.items():
        if options[name] is not None and not any(options[action] for action in belongs):
            spelled = " or ".join(f"--{action}" for action in belongs)
            parser.error(f"--{name.replace('_', '-')} goes with {spelled}")
    if options["convert"] and options["to"] is None:
        parser.error("--convert needs --to peft or --to compact")
    return options
