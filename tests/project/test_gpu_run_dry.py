"""benchmarks/gpu_run.py without a card: floors, tables, processes that misbehave, a bare checkout.

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
from gpu import expected, floors, report, rows  # noqa: E402

from randlora_ext import TernaryBasis  # noqa: E402

H100 = floors.Ceilings(copy_bytes_per_s=3.0e12, bf16_flop_per_s=798e12, fp32_flop_per_s=67e12)


def test_floors():
    # 4096 x 4096 at 1/64: dW in bf16 has 34 MB, gamma 2 MB.
    lists, planes = TernaryBasis(4096, 4096, 32, 1 / 64), TernaryBasis(4096, 4096, 32, 1 / 3)
    form = floors.delta_weight(lists)
    assert form.bytes == pytest.approx(36e6, rel=0.02)
    assert form.us(H100) == form.byte_us(H100) == pytest.approx(12, rel=0.02)
    product = 2 * 4096**3 / 798e12 * 1e6
    assert floors.delta_weight(planes).us(H100) == pytest.approx(product)
    # Two bits an element; both lists have 32 bits an entry.
    assert floors.planes_bytes(planes) == 4096 * 4096 / 4
    both = floors.list_bytes(lists) + floors.list_bytes(lists, True)
    packed = sum(t.numel() * t.element_size() for t in lists.packed()[:6])  # on CUDA tables follow
    assert both == pytest.approx(packed, rel=0.05)
    # With a dense B the B side of a step has as many operations as the frozen layer's two GEMMs.
    step = floors.linear(planes, 8192, True) + floors.linear_backward(planes, 8192, True)
    assert step.matrix == pytest.approx((2 + 3 / 3) * 2 * 8192 * 4096 * 4096)
    reduce = TernaryBasis(14336, 4096, 32, 1 / 3)
    assert floors.linear_backward(reduce, 8, True).matrix > floors.linear(reduce, 8, True).matrix


def test_the_page_shows_what_to_expect(capsys):
    expected.main([])
    page = ROOT / "docs" / "cuda.md"
    assert not page.exists() or capsys.readouterr().out in page.read_text()


def test_tables():
    timed = {"size": "4096x4096", "tokens": 16}
    written = [
        {"stage": "run", "card": "H100", "date": "today"},
        {"stage": "layers", "begins": True},
        {"stage": "layers", "failed": "of the first run", "why": "not shown"},
        {"stage": "layers", "begins": True},
        {"stage": "layers", "error": 0.002},
        {"stage": "layers", "method": "merged", "density": "1/3", "step_ms": 2.0,
         "over_frozen": 1.5, "eager_ms": 3.0, "chosen": True, **timed},
        {"stage": "layers", "failed": "that", "why": "this"},
        {"stage": "layers", "command": "layers", "verdict": "ok", "seconds": 9, "said": ""},
        {"stage": "check", "skipped": "memcheck", "why": "compute-sanitizer is not on PATH"},
    ]  # fmt: skip
    text = report.markdown(written)
    assert text.startswith("# H100") and "| merged | 1/3 | 2 (1.50x) * |" in text
    assert "1 checks against float64, largest error 2.0e-03" in text
    assert "- failed: that: this" in text and "of the first run" not in text
    assert "- skipped: memcheck: compute-sanitizer is not on PATH" in text
    assert "| layers | ok | 9 |" in text


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


def test_what_no_time_is_left_for_is_told(tmp_path):
    run = gpu_run.Run(tmp_path, {"card": "Toy", "cuda": None}, False, 1)
    assert run.stage("block_gemm")
    assert "- skipped: block_gemm: out of time" in (tmp_path / "gpu-toy.md").read_text()


def test_without_a_build_the_question_that_needs_none_is_asked(tmp_path, monkeypatch, capsys):
    def commands(stage: str, *arguments: object) -> list[gpu_run.Command]:
        status = int(stage == "build")
        return [gpu_run.Command(stage, [sys.executable, "-c", f"raise SystemExit({status})"], 30)]

    monkeypatch.setattr(gpu_run, "commands", commands)
    card = {"card": "Toy", "torch": "2", "cuda": "13.0"}
    monkeypatch.setattr(gpu_run, "card_at_hand", lambda dry: card)
    assert gpu_run.main(["--out", str(tmp_path)]) == 1
    assert "check: left out, because the build failed" in capsys.readouterr().out
    kept = report.read(tmp_path / "gpu-toy.jsonl")
    verdicts = {row["command"]: row["verdict"] for row in kept if "command" in row}
    assert verdicts == {"build": "exit status 1", "block_gemm": "ok"}


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


def test_the_products_of_block_bases_need_no_extension(bare, tmp_path):
    bare |= rows.environment(str(tmp_path / "rows"), "block_gemm", 100)
    command = [sys.executable, "-W", "error", "-m", "gpu.block_gemm", "--dry"]
    done = subprocess.run(command, env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept = report.read(tmp_path / "rows")
    checked = [row for row in kept if "error" in row]
    assert {row["dtype"] for row in checked} == {"torch.float64", "torch.bfloat16"}
    assert len({row["method"] for row in checked}) == 7
    timed = [row for row in kept if "us" in row]
    assert {row["tokens"] for row in timed} == {16, 3} and not any("failed" in r for r in kept)
    assert "V and U not padded" in " ".join(row["method"] for row in timed if row["tokens"] == 3)


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
