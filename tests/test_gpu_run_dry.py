"""benchmarks/gpu_run.py without a card: its arithmetic and tables; end to end where there is time.

The whole dry run needs the CUDA library compiled for the CPU. tests/cuda/run_python_tests.sh, which
builds it, asks for it by RANDLORA_GPU_RUN_DRY=1.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
if not (ROOT / "benchmarks" / "gpu").is_dir():
    pytest.skip("there are no benchmarks beside these tests", allow_module_level=True)
pytest.importorskip("peft")
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_run  # noqa: E402
from gpu import build, floors, report  # noqa: E402
from gpu.card import Card, saved_bytes, short_name  # noqa: E402
from gpu.methods import PATHS, all_methods  # noqa: E402
from gpu.stage import Stage, density_of  # noqa: E402

from randlora_ext import TernaryBasis  # noqa: E402

CEILINGS = {"copy_bytes_per_s": 3.35e12, "bf16_flop_per_s": 989e12, "fma_per_s": 28.7e12,
            "integer_per_s": 14.4e12}  # fmt: skip


def test_floors_of_the_figures():
    # 4096 x 4096 at 1/64: dW in bf16 is 34 MB, gamma 2 MB: 11 us; a GEMM takes 139 at 989 TFLOP/s.
    sparse, planes = TernaryBasis(4096, 4096, 32, 1 / 64), TernaryBasis(4096, 4096, 32, 1 / 3)
    form = floors.delta_weight(sparse)
    assert form.bytes == pytest.approx(36e6, rel=0.02)
    assert form.byte_us(CEILINGS) == pytest.approx(10.8, rel=0.02)
    assert form.operation_us(CEILINGS) < form.byte_us(CEILINGS)
    assert floors.delta_weight(planes).operation_us(CEILINGS) == pytest.approx(139, rel=0.01)
    # Two bits an element; both lists 32 bits an entry.
    assert floors.planes_bytes(planes) == 4096 * 4096 / 4
    lists = floors.list_bytes(sparse) + floors.list_bytes(sparse, True)
    assert lists == pytest.approx(sparse.packed_bytes(), rel=0.05)
    # A layer at T = 8192: the B side is half of a frozen layer's two units.
    step = floors.linear(planes, 8192, True) + floors.linear_backward(planes, 8192, True)
    unit = 2 * 8192 * 4096 * 4096
    assert step.matrix == pytest.approx((2 + 3 / 3) * unit)
    reduce = TernaryBasis(14336, 4096, 32, 1 / 3)
    assert floors.linear_backward(reduce, 8, True).matrix > floors.linear(reduce, 8, True).matrix


def test_densities_and_names():
    assert density_of("1/3", 9) == 1 / 3 and density_of("0.07", 9) == 0.07
    assert density_of("1/sqrt(d)", 4096) == 1 / 64
    symbol = ("void randlora::cuda::(anonymous namespace)::form_kernel<randlora::bf16, false>"
              "(randlora::cuda::Prepared<float>, long)")  # fmt: skip
    assert short_name(symbol) == "form_kernel<bf16, false>"
    assert short_name("void at::native::add<float>(int, float*)") == "at::native::add<float>"


def test_card_on_the_cpu(tmp_path):
    card = Card(dry=True)
    x, w = torch.randn(50, 40, requires_grad=True), torch.randn(40, 40)
    times = card.medians({"a": lambda: x @ w, "b": lambda: x @ w}, 0.0)
    assert set(times) == {"a", "b"} and min(times.values()) > 0
    assert card.wall(lambda: x @ w, 0.001) > 0 and card.peak_bytes(lambda: None) is None
    assert saved_bytes(lambda: (x.exp() @ w).sum(), [w]) == 50 * 40 * 4  # exp's result, once
    assert saved_bytes(lambda: x @ w, [w, x]) == 0


def test_rows_survive_a_kill(tmp_path):
    rows = tmp_path / "rows.jsonl"
    stage = Stage("Doc.", ["--rows", str(rows), "--budget", "5", "--dry"])
    stage.row(a=1)
    stage.failed("that", ValueError("because\nof this"))
    with rows.open("a") as file:
        file.write('{"cut": ')
    assert gpu_run.rows_in(rows) == [{"a": 1}, {"failed": "that", "why": "ValueError: because"}]
    assert 0 < stage.left() <= 5 and gpu_run.rows_in(tmp_path / "none") == []


def results(**stages):
    made = {k: {"status": "done", "seconds": 1.0, "rows": v} for k, v in stages.items()}
    return {"card": "Card", "date": "today", "commit": "abc", "dry": False, "stages": made}


def layer_row(method, density, ms, **more):
    return {"size": "4096x4096", "tokens": 8192, "method": method, "density": density,
            "timing": "graph", "step_ms": ms, "over_frozen": ms, "forward_ms": 1.0,
            "eager_ms": 1.0, "saved_bytes": 1 << 20, "peak_bytes": None, **more}  # fmt: skip


def test_report_of_nothing_and_of_something():
    assert "Nothing measured" in report.markdown(results())
    text = report.markdown(
        results(
            layers=[
                layer_row("frozen", "", 1.0),
                layer_row("delta", "1/3", 2.5),
                layer_row("factored, dense B", "1/3", 2.0, chosen=True),
                layer_row("merged", "1/3", 1.5),
                {"verified": False, "error": 0.5, "method": "delta", "density": "1/3", "size": "s"},
                {"failed": "that", "why": "this"},
            ],
            kernels=[
                {
                    "op": "whole basis",
                    "size": "14336x4096",
                    "density": "1/3",
                    "tokens": None,
                    "us": 150.0,
                    "timing": "events",
                    "byte_us": 5.0,
                    "operation_us": 46.0,
                    "over_floor": 3.3,
                    "kernels": [
                        {
                            "kernel": "fill_planes_kernel",
                            "launches": 2.0,
                            "us": 70.0,
                            "byte_us": 4.4,
                            "operation_us": 40.0,
                            "over_floor": 1.75,
                        }
                    ],
                }
            ],
            checks=[
                {"counts": {"passed": 7, "skipped": 2}, "broken": ["x::y"], "stopped_by_time": True}
            ],
            model=[
                {
                    "method": "ours, 1/3",
                    "tokens_per_s": 7.0,
                    "over_lora": 0.95,
                    "step_ms": 1.0,
                    "peak_bytes": 1 << 30,
                    "adapter_bytes": 1 << 20,
                }
            ],
        )  # fmt: skip
    )
    assert "| layer 4096x4096, T=8192, 1/3, over frozen, exact | 2.2x | 2.00x |" in text
    assert "| layer 4096x4096, T=8192, 1/3, over frozen, merged | 1.6x | 1.50x |" in text
    assert "2 (2.00x) *" in text and "WRONG: delta" in text and "failed: that: this" in text
    assert "| 150 e | 5 | 46 | 3.3 |" in text
    assert "| `fill_planes_kernel` | 2 | 70 | 4.4 | 40 | 1.75 |" in text
    assert "| basis 14336x4096, 1/3 | 1 ms | 0.15 ms |" in text
    assert "7 passed, 2 skipped; stopped" in text and "broken: `x::y`" in text and "0.95x" in text


def test_a_stage_that_dies_or_hangs_costs_only_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "GRACE", 0.5)
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "__init__.py").touch()
    for name, row, end in (("dies", '{"a": 1}', "os.abort()"), ("hangs", '{"b": 2}', "sleep(99)")):
        (tmp_path / "gpu" / f"{name}.py").write_text(
            "import os, sys\nfrom time import sleep\n"
            f"open(sys.argv[2], 'a').write({row!r} + chr(10))\n{end}\n"
        )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    monkeypatch.setattr(gpu_run, "environment", lambda dry, ceilings: environment)
    run = gpu_run.Run(tmp_path / "out", True, 60)
    assert not run.stage("dies", 20) and not run.stage("hangs", 1)
    kept = json.loads((tmp_path / "out" / "gpu-dry.json").read_text())["stages"]
    assert kept["dies"]["rows"] == [{"a": 1}] and kept["dies"]["status"].startswith("failed")
    assert kept["hangs"]["rows"] == [{"b": 2}] and kept["hangs"]["status"].startswith("killed")
    assert "killed" in (tmp_path / "out" / "gpu-dry.md").read_text()


def test_a_command_is_not_waited_for_through_what_it_started():
    # As compute-sanitizer, which holds the program that it watches: a grandchild keeps the output.
    program = (
        "import subprocess, time; subprocess.Popen(['sleep', '30']); print('said', flush=True)"
    )
    for end, status in (("", 0), ("; time.sleep(30)", 124)):
        started = time.monotonic()
        done = build.run([sys.executable, "-c", program + end], 2.0)
        assert done == (status, "said\n") and time.monotonic() - started < 20


def test_what_a_stage_leaves_running_ends_with_it(tmp_path, monkeypatch):
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "__init__.py").touch()
    (tmp_path / "gpu" / "leaves.py").write_text(
        "import subprocess, sys\nchild = subprocess.Popen(['sleep', '60'])\n"
        "open(sys.argv[2], 'a').write('{\"child\": %d}\\n' % child.pid)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    monkeypatch.setattr(gpu_run, "environment", lambda dry, ceilings: environment)
    run = gpu_run.Run(tmp_path / "out", True, 60)
    assert run.stage("leaves", 20)
    child = Path("/proc", str(run.results["stages"]["leaves"]["rows"][0]["child"]), "stat")
    for _ in range(100):
        # Gone, or dead and not yet reaped by the init process.
        if not child.exists() or child.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("the child still runs")


def test_without_peft_the_other_methods_are_measured(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    broken = []
    made = all_methods((48, 40), torch.device("cpu"), lambda *failure: broken.append(failure), 8)
    assert {m.name for m in made} == {"frozen", *PATHS} and len(made) == 2 + 3 * len(PATHS)
    assert len(broken) == 4 and all("PEFT" in what or "LoRA" in what for what, _ in broken)


def test_a_machine_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert gpu_run.commit() == "unknown"


@pytest.mark.skipif(
    os.environ.get("RANDLORA_GPU_RUN_DRY") != "1",
    reason="minutes: tests/cuda/run_python_tests.sh asks for it",
)
def test_the_whole_dry_run(tmp_path):
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_run.py", "--dry", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    kept = json.loads((tmp_path / "gpu-dry.json").read_text())
    assert list(kept["stages"]) == list(gpu_run.STAGES)
    rows = {name: stage["rows"] for name, stage in kept["stages"].items()}
    methods = {r["method"] for r in rows["layers"] if "step_ms" in r}
    assert len(methods) == 9 and len([r for r in rows["layers"] if r.get("verified")]) == 39
    assert {r["method"].split(",")[0] for r in rows["model"]} >= {"frozen", "ours", "LoRA r=8"}
    assert all(r["as_wanted"] for r in rows["sanitizer"])
    assert rows["checks"][0]["counts"]["passed"] > 10
    assert not any("failed" in r or "skipped" in r for r in [*rows["layers"], *rows["kernels"]])
    assert (tmp_path / "gpu-dry.md").read_text().startswith("# cpu (dry run")
