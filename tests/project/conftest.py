"""Programs of examples/, run in this process: each new one would import for seconds."""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
if not all(map(importlib.util.find_spec, ("peft", "transformers", "matplotlib"))):
    collect_ignore = [
        "test_benchmarks.py", "test_examples.py", "test_finetune_benchmark.py", "test_smollm2.py",
    ]  # fmt: skip


@pytest.fixture
def run_example(monkeypatch, tmp_path, capsys, stock_peft):
    """Runs a program with its arguments in an empty folder; returns what it prints."""

    def run(name: str, *arguments: object) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run
