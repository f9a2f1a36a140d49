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


def test_what_a_card_measured_goes_into_the_table(tmp_path, capsys):
    rates = {"copy_bytes_per_s": 1.5e12, "bf16_flop_per_s": 399e12, "fp32_flop_per_s": 33e12}
    about = {"stage": "hadamard", "bases": "hadamard", "size": "4096x1024", "tokens": 8192}
    made = [{"stage": "run", **rates}, {"stage": "hadamard", "begins": True},
            {**about, "over_frozen": 1.924}]  # fmt: skip
    (tmp_path / "rows").write_text("\n".join(map(json.dumps, made)))
    expected.main([])
    expected.main([str(tmp_path / "rows")])
    lines = [x for x in capsys.readouterr().out.splitlines() if "8192, 4096 to 1024" in x]
    was, now = ([cell.strip() for cell in line.split("|")[2:-1]] for line in lines)
    assert float(now[0]) == pytest.approx(2 * float(was[0]), abs=1)  # at half the rates
    assert now[2:5] == was[2:5] and was[5] == "" and now[5] == "1.92"


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
    verdicts = {r["command"]: r["verdict"] for r in kept if "command" in r}
    assert verdicts["dies"].startswith("exit status")
    assert verdicts["hangs"] == "stopped after 4 s" and verdicts["works"] == "ok"
    assert next(r["said"] for r in kept if r.get("command") == "works") == "last line"
    assert {"stage": "check", "skipped": "tool", "why": "no-such-program is not on PATH"} in kept
    assert "stopped after 4 s" in (tmp_path / "gpu-toy-9.md").read_text()


def toys(monkeypatch, tmp_path, **programs):
    """gpu_run.main with a program, or nothing, in the place of each stage's commands."""

    def commands(stage, *_):
        argv = ["true"]
        if stage in programs:
            argv = [sys.executable, "-c", f"import time\nfrom gpu import rows\n{programs[stage]}"]
        return [gpu_run.Command(f"of {stage}", argv, 3)]

    monkeypatch.setattr(gpu_run, "commands", commands)
    monkeypatch.setattr(gpu_run, "LEAST", 0.0)
    monkeypatch.setattr(gpu_run, "card_at_hand", lambda dry: CARD)
    monkeypatch.setattr(gpu_run, "missing", lambda stages: [])
    status = gpu_run.main(["--stages", "all", "--out", str(tmp_path)])
    return status, report.read(tmp_path / "gpu-toy-9.jsonl")


DIES = "raise SystemExit('planted')"
SAYS_SO = "rows.failed('a part', ValueError('planted'))"


@pytest.mark.parametrize(
    "stage, program",
    [("build", DIES), ("hadamard_torch", SAYS_SO), ("layers", DIES), ("kernels", SAYS_SO)],
)
def test_a_stage_that_fails_is_told(monkeypatch, tmp_path, capsys, stage, program):
    status, kept = toys(monkeypatch, tmp_path, **{stage: program})
    printed = capsys.readouterr().out
    assert status == 1
    assert f"| {stage} | failed |" in printed and "planted" in printed
    assert "planted" in (tmp_path / "gpu-toy-9.md").read_text()
    others = {name: "ok" for name in gpu_run.STAGES} | {stage: "failed"}
    if stage == "build":  # what it would have served is not tried
        others = dict.fromkeys(others, "left out") | {"hadamard_torch": "ok", "build": "failed"}
    assert {name: report.outcome(name, kept) for name in gpu_run.STAGES} == others


@pytest.mark.parametrize("program", ["rows.skipped('the last size')", "time.sleep(60)"])
def test_a_stage_that_stops_early_is_told_apart(monkeypatch, tmp_path, capsys, program):
    status, kept = toys(monkeypatch, tmp_path, layers="rows.row(a=1)\n" + program)
    assert status == 3 and "| layers | stopped early |" in capsys.readouterr().out
    assert report.outcome("kernels", kept) == "ok"
    assert any(row.get("a") == 1 for row in report.latest("layers", kept))


def test_all_is_well(monkeypatch, tmp_path):
    sign = f"import pathlib; began = pathlib.Path(r'{tmp_path / 'began'}')\n"
    waits = "deadline = time.time() + 2.5\nwhile not began.exists(): assert time.time() < deadline"
    status, kept = toys(
        monkeypatch, tmp_path, build=f"{sign}began.touch()", hadamard_torch=sign + waits
    )
    assert status == 0  # the build began while the first stage ran
    order = [row["stage"] for row in kept if "begins" in row]
    assert order == list(gpu_run.STAGES)


def test_no_command_takes_ten_minutes(tmp_path):
    for stage in gpu_run.STAGES:
        for command in gpu_run.commands(stage, CARD, False, tmp_path):
            assert command.seconds <= 500, command.name
    first = [gpu_run.DEFAULT[k] for k in (0, 2, 3, 4)]
    assert first == ["hadamard_torch", "parity", "hadamard", "model"]


def test_what_is_missing_is_named(monkeypatch):
    find = {"numpy": None, "ninja": None}.get
    monkeypatch.setattr(gpu_run.importlib.util, "find_spec", lambda name: find(name, name))
    monkeypatch.setattr(gpu_run.importlib.metadata, "version", lambda package: "76.1")
    monkeypatch.setattr(gpu_run.shutil, "which", lambda program, path=None: None)
    assert gpu_run.missing(["build", "layers"]) == ["'setuptools>=77'", "numpy", "ninja"]
    assert gpu_run.missing(["hadamard_torch"]) == []


def test_help_says_what_to_type(capsys):
    with pytest.raises(SystemExit):
        gpu_run.main(["--help"])
    printed = capsys.readouterr().out
    typed = [line.split("--stages") for line in printed.splitlines() if line[:10] == "    python"]
    stages = [part[1].strip().split(",") for part in typed if len(part) == 2]
    assert [*gpu_run.DEFAULT, *stages[0], *stages[1]] == list(gpu_run.STAGES)


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


def test_torch_alone_gets_one_line_in_the_first_second(bare):
    began = time.monotonic()
    done = python(bare, "benchmarks/gpu_run.py")
    assert done.returncode == 2 and time.monotonic() - began < 5  # the machine may be busy
    assert done.stdout.startswith("missing: pip install ") and len(done.stdout.splitlines()) == 1
    assert {"pybind11", "peft"} < set(done.stdout.split()) and "setuptools" not in done.stdout


def test_a_machine_without_a_card_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu_run, "card_at_hand", lambda dry: {"torch": "2.11"})
    assert gpu_run.main(["--stages", "hadamard_torch"]) == 2
    assert "torch 2.11 sees no CUDA card" in capsys.readouterr().out


def test_hadamard_bases_in_plain_torch_need_torch_alone(bare, tmp_path):
    done = python(bare, "-W", "error", "benchmarks/gpu_run.py", "--dry", "--stages",
                  "hadamard_torch", "--out", str(tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    kept = report.latest("hadamard_torch", report.read(tmp_path / "gpu-dry.jsonl"))
    checked = [row for row in kept if "error" in row]
    assert {row["dtype"] for row in checked} == {"torch.float64", "torch.bfloat16"}
    assert len({row["method"] for row in checked}) >= 4
    timed = [row for row in kept if "us" in row]
    assert {row["tokens"] for row in timed} == {16, 3} and not any("failed" in r for r in kept)
    assert "Hadamard, plain torch" in {row["method"] for row in timed}
    assert [row["why"] for row in kept if "skipped" in row] == ["peft is not installed"]


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
    of = {name: report.latest(name, kept) for name in gpu_run.STAGES}
    ran = set(of) - {"racecheck", "slow"}
    assert all(report.outcome(name, kept) == "ok" for name in ran)
    methods = {row["method"].split(" r=")[0] for row in of["hadamard_torch"] if "error" in row}
    assert methods > {"LoRA by addmm", "PEFT's LoRA"}
    compared = {row["basis"] for row in of["parity"] if "error" in row}
    assert compared == {"hadamard", "1/3", "0.07", "dense"}
    assert len([row for row in of["hadamard"] if "step_ms" in row]) == 2 * 2 * 3
    # three densities by four paths, Hadamard by two, dense by three
    ours, others = 3 * 4 + 2 + 3, 3
    assert len([row for row in of["layers"] if "error" in row]) == 2 * ours
    assert len([row for row in of["layers"] if "step_ms" in row]) == 2 * 2 * (ours + others)
    methods = {row["method"].split(",")[0] for row in of["model"] if "loss" in row}
    assert methods == {"frozen", "LoRA", "ours", "PEFT's RandLoRA"}
    assert len({row["op"] for row in of["kernels"] if "over_floor" in row}) == 20
    (passed,) = (row["said"] for row in of["tests"] if row.get("command") == "GPU tests, not slow")
    assert int(passed.split(" passed")[0].split()[-1]) > 5, json.dumps(passed)
