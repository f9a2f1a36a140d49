"""The command line ``randlora``.

A module beside the package, so that --help need not wait for the package's import of torch.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

_OPERANDS = {
    "model": ("MODEL", "a local folder with safetensors"),
    "source": ("ADAPTER", "a folder of save_adapter or of PEFT's save_pretrained"),
    "out": ("OUT", "the folder to write, new or empty"),
}
_COMMANDS: tuple[tuple[str, str, str, Iterable[str]], ...] = (
    ("check", "what a bug report needs, and a self-check (the default)", "", ()),
    ("merge", "add an adapter to the weights of a model", "my-model my-adapter merged", _OPERANDS),
    (
        "dial",
        "measure what an adapter times a factor has learned and forgotten, or set a factor",
        "my-model my-adapter --task a.jsonl --text b.txt",
        ("model", "source"),
    ),
)
_OPTIONS: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "dial": (
        ("--task", {"type": Path, "help": "what it learned: .jsonl or a text"}),
        ("--text", {"type": Path, "help": "what it should not forget: likewise"}),
        ("--tokens", {"type": int, "default": 4096, "help": "to read of each file (4096)"}),
        ("--plot", {"type": Path, "help": "a picture to write"}),
        ("--set", {"type": float, "dest": "factor", "help": "multiply by it; measure nothing"}),
        ("--out", {"type": Path, "help": "the folder for that adapter, new or empty"}),
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command, "check" if none is named; returns the exit code.

    Raises SystemExit for --help and for arguments that do not go together.
    """
    options = vars(_parser().parse_args(arguments))
    command = options.pop("command") or "check"
    if options.pop("version"):
        from randlora_ext import __version__

        print(f"randlora_ext {__version__}")
        return 0
    from randlora_ext.cli import run

    return run(command, **options)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    """Each command takes the parameters of the function of its name in `randlora_ext.cli`."""
    parser = _Parser(
        prog="randlora",
        description="RandLoRA adapters from the shell. Exit code 0: done; 1: a check failed; "
        "2: something to put right, told in one line.",
        epilog="example: randlora merge my-model my-adapter merged",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")

    for name, told, example, operands in _COMMANDS:
        command = commands.add_parser(
            name,
            help=told,
            description=f"{told[0].upper()}{told[1:]}.",
            epilog=f"example: randlora {name} {example}",
            allow_abbrev=False,
        )
        for operand in operands:
            metavar, meaning = _OPERANDS[operand]
            command.add_argument(operand, metavar=metavar, type=Path, help=meaning)
        for option, settings in _OPTIONS.get(name, ()):
            metavar = option.removeprefix("--").upper()
            command.add_argument(option, metavar=metavar, **settings)
    return parser
