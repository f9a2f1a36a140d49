"""benchmarks/gpu_run.py without a card.

All stages at toy size take minutes and need the CUDA library compiled for the CPU.
tools/cuda/run_python_tests.sh, which builds it, asks for them by RANDLORA_GPU_RUN_DRY=1.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gpu_run
import pytest
from gpu import expected, report

ROOT = Path(__file__).parents[2]


def test_the_page_shows_what_to_expect(capsys):
    expected.main([])
    page = ROOT / "docs" / "cuda.md"
    assert not page.exists() or capsys.readouterr().out in page.read_text()


def test_kernels_that_do_not_load_are_not_measured(tmp_path, monkeypatch, capsys):
    # --built takes the build on trust, not that it loads: plain torch would be measured as ours.
    (tmp_path / "old.c").write_text(
        "static unsigned long long table[64];  /* begins with the hash of the headers: 0 */\n"
        "void *randlora_cuda_kernels(void) { return table; }\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", "old.c", "-o", "old.so"], cwd=tmp_path, check=True)
    monkeypatch.setenv("RANDLORA_CUDA_LIBRARY", str(tmp_path / "old.so"))
    card = {"card": "cpu", "torch": "2.11", "cuda": None}
    monkeypatch.setattr(gpu_run, "card_at_hand", lambda dry: card)
    dry = ["--dry", "--built", "--stages", "parity", "--out", str(tmp_path)]
    assert gpu_run.main(dry) == 1 and "| build | failed |" in capsys.readouterr().out
    said = (tmp_path / "gpu-dry-build.log").read_text()
    assert re.search(r"'cuda': 'not loaded: \S+old.so was built from other sources", said), said
    kept = report.read(tmp_path / "gpu-dry.jsonl")
    assert report.outcome("build", kept) == "failed"
    assert report.outcome("parity", kept) == "left out"


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
