"""benchmarks/gpu_run.py without a card: processes that misbehave, a bare checkout.

All stages at toy size take minutes and need the CUDA library compiled for the CPU.
tools/cuda/run_python_tests.sh, which builds it, asks for them by RANDLORA_GPU_RUN_DRY=1.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import gpu_run
import pytest
from gpu import expected, report

ROOT = Path(__file__).parents[2]
CARD = {"card": "NVIDIA Toy 9", "cuda": "13.0", "torch": "2.11", "capability": "9.0"}


def test_the_page_shows_what_to_expect(capsys):
    expected.main([])
    page = ROOT / "docs" / "cuda.md"
    assert not page.exists() or capsys.readouterr().out in page.read_text()


def test_a_process_that_dies_or_hangs_costs_only_itself(tmp_path, monkeypatch):
    def python(name: str, program: str, seconds: float) -> gpu_run.Command:
        program = "import os, time\nfrom gpu import rows\n" + program
        return gpu_run.Command(name, [sys.executable, "-c", program], seconds)

    made = [
        python("dies", "rows.row(a=1)\nos.abort()", 30),
        python("hangs", "rows.row(b=2)\nos.system('sleep 60')", 4),
        python("works", "rows.row(left=rows.seconds_left())\nprint('last line')", 30),
        gpu_run.Command("tool", [], 30, watched=["no-such-program"]),
    ]
    monkeypatch.setattr(gpu_run, "commands", lambda *arguments: made)
    monkeypatch.setattr(gpu_run, "LEAST", 0.0)
    run = gpu_run.Run(tmp_path, CARD, False, 60)
    started = time.monotonic()
    assert run.stage("check") == "failed"
    assert time.monotonic() - started < 50  # the sleeping grandchild went with its parent
    kept = report.latest("check", report.read(tmp_path / "gpu-toy-9.jsonl"))
    assert [r.get("a") or r.get("b") for r in kept if "a" in r or "b" in r] == [1, 2]
    assert 0 < next(r["left"] for r in kept if "left" in r) < 30
    of = {r["command"]: r for r in kept if "command" in r}
    assert of["dies"]["verdict"].startswith("exit status")
    assert of["hangs"]["verdict"] == "stopped after 4 s" and of["works"]["verdict"] == "ok"
    assert of["works"]["said"] == "last line"
    assert {"stage": "check", "skipped": "tool", "why": "no-such-program is not on PATH"} in kept
    assert "stopped after 4 s" in (tmp_path / "gpu-toy-9.md").read_text()


@pytest.fixture
def bare(tmp_path) -> dict[str, str]:
    """The environment of a process that finds torch, but neither the extension nor other tools."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys; sys.modules.update(dict.fromkeys(['randlora_ext', 'peft', 'pybind11']))"
    )
    paths = os.pathsep.join([str(tmp_path), str(ROOT / "benchmarks")])
    return {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def python(environment, *arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment,
                          capture_output=True, text=True)  # fmt: skip


def test_torch_alone_gets_one_line(bare):
    done = python(bare, "benchmarks/gpu_run.py")
    assert done.returncode == 2
    assert done.stdout.startswith("missing: pip install ") and len(done.stdout.splitlines()) == 1
    assert {"pybind11", "peft"} < set(done.stdout.split()) and "setuptools" not in done.stdout


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
    everything = ("--dry", "--built", "--stages", "all", "--out", str(tmp_path))
    done = python(os.environ, "benchmarks/gpu_run.py", *everything)
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
