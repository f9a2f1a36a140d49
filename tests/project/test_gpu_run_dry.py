"""benchmarks/gpu_run.py without a card: processes that misbehave, a bare checkout.

All stages at toy size take minutes and need the CUDA library compiled for the CPU.
tools/cuda/run_python_tests.sh, which builds it, asks for them by RANDLORA_GPU_RUN_DRY=1.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
if not (ROOT / "benchmarks" / "gpu").is_dir():
    pytest.skip("there are no benchmarks beside these tests", allow_module_level=True)
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_run  # noqa: E402
from gpu import expected, report, rows  # noqa: E402


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
    run = gpu_run.Run(tmp_path, {"card": "NVIDIA Toy 9", "cuda": "13.0"}, False, 60)
    started = time.monotonic()
    assert not run.stage("check")
    assert time.monotonic() - started < 50  # the sleeping grandchild went with its parent
    kept = report.latest("check", report.read(tmp_path / "gpu-toy-9.jsonl"))
    assert [r.get("a") or r.get("b") for r in kept if "a" in r or "b" in r] == [1, 2]
    assert 0 < next(r["left"] for r in kept if "left" in r) < 30
    verdicts = {r["command"]: r["verdict"] for r in kept if "command" in r}
    assert verdicts["dies"].startswith("exit status")
    assert verdicts["hangs"] == "stopped after 4 s" and verdicts["works"] == "ok"
    assert next(r["said"] for r in kept if r.get("command") == "works") == "last line"
    assert {"stage": "check", "skipped": "tool", "why": "no-such-program is not on PATH"} in kept
    assert "stopped after 4 s" in (tmp_path / "gpu-toy-9.md").read_text()


@pytest.fixture
def bare(tmp_path) -> dict[str, str]:
    """The environment of a process that finds no randlora_ext and no card."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name == 'randlora_ext':\n"
        "            raise ModuleNotFoundError('randlora_ext is not built', name=name)\n"
        "sys.meta_path.insert(0, Refuse)\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(ROOT / "benchmarks")])
    return {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def test_a_bare_checkout_says_that_the_card_is_missing(bare):
    done = subprocess.run([sys.executable, "benchmarks/gpu_run.py"], cwd=ROOT, env=bare,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 1 and "sees no CUDA card" in done.stdout, done.stdout + done.stderr


def test_hadamard_bases_in_plain_torch_need_no_extension(bare, tmp_path):
    bare |= rows.environment(str(tmp_path / "rows"), "hadamard_torch", 100)
    command = [sys.executable, "-W", "error", "-m", "gpu.hadamard_torch", "--dry"]
    done = subprocess.run(command, env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept = report.read(tmp_path / "rows")
    checked = [row for row in kept if "error" in row]
    assert {row["dtype"] for row in checked} == {"torch.float64", "torch.bfloat16"}
    assert len({row["method"] for row in checked}) >= 5
    timed = [row for row in kept if "us" in row]
    assert {row["tokens"] for row in timed} == {16, 3} and not any("failed" in r for r in kept)
    assert "Hadamard, plain torch" in {row["method"] for row in timed}


@pytest.mark.skipif(
    os.environ.get("RANDLORA_GPU_RUN_DRY") != "1",
    reason="minutes: tools/cuda/run_python_tests.sh asks for it",
)
def test_the_whole_dry_run(tmp_path):
    command = [sys.executable, "benchmarks/gpu_run.py", "--dry", "--stages", "all", "--out"]
    done = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    kept = report.read(tmp_path / "gpu-dry.jsonl")
    assert not any("failed" in row for row in kept)
    left_out = {row["skipped"]: row["why"] for row in kept if "skipped" in row}
    assert left_out == {"memcheck --plant": "only on a card", "GPU tests, slow": "only on a card"}
    of = {name: report.latest(name, kept) for name in gpu_run.STAGES}
    assert all(any(r.get("verdict") == "ok" for r in of[name]) for name in set(of) - {"slow"})
    assert len([row for row in of["layers"] if "error" in row]) == 38
    assert len([row for row in of["layers"] if "step_ms" in row]) == 96
    assert {row["method"].split(",")[0] for row in of["model"] if "loss" in row} == {
        "frozen", "LoRA", "ours", "PEFT's RandLoRA",
    }  # fmt: skip
    assert len({row["op"] for row in of["kernels"] if "over_floor" in row}) == 17
    (passed,) = (row["said"] for row in of["check"] if row.get("command") == "GPU tests, not slow")
    assert int(passed.split(" passed")[0].split()[-1]) > 5, json.dumps(passed)
