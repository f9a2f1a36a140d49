"""benchmarks/gpu_run.py without a card.

All stages at toy size take minutes and need the CUDA library compiled for the CPU.
tools/cuda/run_python_tests.sh, which builds it, asks for them by RANDLORA_GPU_RUN_DRY=1.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_run
import pytest
from gpu import expected, report

ROOT = Path(__file__).parents[2]


def test_the_page_shows_what_to_expect(capsys):
    expected.main([])
    tables = capsys.readouterr().out.strip().split("\n\n")
    page = ROOT / "docs" / "cuda.md"
    assert len(tables) == 2
    if page.exists():  # not in an sdist
        assert all(table in page.read_text() for table in tables)


@pytest.mark.skipif(
    os.environ.get("RANDLORA_GPU_RUN_DRY") != "1",
    reason="minutes: tools/cuda/run_python_tests.sh asks for it",
)
def test_the_whole_dry_run(tmp_path):
    everything = ["--dry", "--built", "--stages", "all", "--out", str(tmp_path)]
    command = [sys.executable, "benchmarks/gpu_run.py", *everything]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    kept = report.read(tmp_path / "gpu-dry.jsonl")
    assert not any("failed" in row for row in kept)
    left_out = {row["skipped"]: row["why"] for row in kept if "skipped" in row}
    on_a_card = ("memcheck --plant", "racecheck", "GPU tests, slow")
    assert left_out == dict.fromkeys(on_a_card, "only on a card")
    ran = set(gpu_run.STAGES) - {"racecheck", "slow"}
    assert all(report.outcome(name, kept) == "ok" for name in ran)
    tests = report.latest("tests", kept)
    of_models = [row for row in report.latest("model", kept) if "step_ms" in row]
    assert {"LoRA", "ours, hadamard"} <= {row["method"] for row in of_models}
    assert all(row["host_ms"] > 0 and row["device_ms"] > 0 for row in of_models)
    (passed,) = (row["said"] for row in tests if row.get("command") == "GPU tests, not slow")
    assert int(passed.split(" passed")[0].split()[-1]) > 5, json.dumps(passed)
