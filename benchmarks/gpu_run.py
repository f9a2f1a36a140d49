"""Everything that wants a GPU, in one command, in under eight minutes: build, test, measure.

    python benchmarks/gpu_run.py                         on the card at hand
    python benchmarks/gpu_run.py --dry                   the same stages on the CPU, tiny shapes
    python benchmarks/gpu_run.py --stages build,kernels --budget 200 --out DIR

It needs the repository, torch with CUDA, nvcc, and setuptools, pybind11, ninja, pytest, hypothesis,
peft, transformers; it installs nothing (the extension is built in place). Each stage is a process
with a deadline, so that one that dies or hangs costs only itself. After every stage, and within it
after every row, the results are on disk: gpu-CARD.json, gpu-CARD.md, gpu-CARD.log in --out.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))

from gpu import report  # noqa: E402
from gpu.build import CPU_LIBRARY  # noqa: E402

# Seconds of each stage on an H100; what one leaves over, those after it share.
STAGES = {
    "ceilings": 20,
    "build": 120,
    "checks": 75,
    "sanitizer": 60,
    "layers": 105,
    "kernels": 45,
    "model": 50,
}
GRACE = 5.0  # seconds beyond its deadline before a stage is killed
NEEDED = ("ceilings", "build")  # without these nothing after them makes sense


def environment(dry: bool, results: Path) -> dict[str, str]:
    paths = [str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]
    # Beside Python lies ninja, which torch's builds look for on PATH: without it they take minutes.
    programs = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    new = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1",
           "PATH": os.pathsep.join(filter(None, programs)),
           "HF_HUB_OFFLINE": "1", "RANDLORA_CEILINGS": str(results)}  # fmt: skip
    if dry:
        new |= {"RANDLORA_CUDA_LIBRARY": str(CPU_LIBRARY), "RANDLORA_CUDA_SERVES_CPU": "1",
                "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    return {**os.environ, **new}


def commit() -> str:
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT,
                              capture_output=True, text=True)  # fmt: skip
    except OSError:  # no git
        return "unknown"
    return done.stdout.strip() or "unknown"


def rows_in(file: Path) -> list[dict]:
    """What a stage wrote; a last line that a kill cut short is left out."""
    found = []
    for line in file.read_text().splitlines() if file.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


class Run:
    """The results so far, and the files that hold them."""

    def __init__(self, out: Path, dry: bool, budget: float) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.dry = out, dry
        self.end = time.monotonic() + budget
        self.name = "gpu-dry" if dry else "gpu-unknown"
        self.results = {
            "card": "cpu" if dry else "unknown card",
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": commit(),
            "dry": dry,
            "budget_s": budget,
            "stages": {},
        }
        self.discard()  # of an earlier run

    def discard(self) -> None:
        for suffix in (".json", ".md", ".log"):
            self.file(suffix).unlink(missing_ok=True)

    def file(self, suffix: str) -> Path:
        return self.out / f"{self.name}{suffix}"

    def named(self, card: str) -> None:
        """The card is known: files made so far take its name."""
        old = {suffix: self.file(suffix) for suffix in (".json", ".md", ".log")}
        self.results["card"] = card
        word = re.sub(r"[^a-z0-9]+", "-", card.lower().replace("nvidia", "")).strip("-")
        self.name = "gpu-dry" if self.dry else f"gpu-{word}"
        for suffix, path in old.items():
            if path.exists():
                path.replace(self.file(suffix))

    def write(self) -> None:
        for suffix, text in (
            (".json", json.dumps(self.results, indent=1) + "\n"),
            (".md", report.markdown(self.results)),
        ):
            half = self.file(suffix + ".half")
            half.write_text(text)
            half.replace(self.file(suffix))

    def stage(self, name: str, budget: float) -> bool:
        """Runs one stage; whether it ended well and no row tells of a failure."""
        rows, ceilings = self.out / f"gpu-rows-{name}.jsonl", self.out / "gpu-ceilings.json"
        rows.unlink(missing_ok=True)
        command = [sys.executable, "-m", f"gpu.{name}", "--rows", str(rows)]
        command += ["--budget", f"{budget:.0f}"] + ["--dry"] * self.dry
        print(f"== {name}: up to {budget:.0f} s", flush=True)
        started = time.monotonic()
        with self.file(".log").open("a") as log:
            print(f"\n======== {name}", file=log, flush=True)
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment(self.dry, ceilings), stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                status = process.wait(timeout=budget + GRACE)
                verdict = "done" if status == 0 else f"failed (exit status {status})"
            except subprocess.TimeoutExpired:
                verdict = "killed: out of time"
            finally:  # what a stage leaves running would disturb the next
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        found = rows_in(rows)
        rows.unlink(missing_ok=True)
        if name == "ceilings" and found and "card" in found[0]:
            ceilings.write_text(json.dumps(found[0]))
            self.named(found[0]["card"])
        seconds = round(time.monotonic() - started, 1)
        self.results["stages"][name] = {"status": verdict, "seconds": seconds, "rows": found}
        self.write()
        print(f"   {verdict}, {seconds} s, {len(found)} rows", flush=True)
        if verdict != "done":
            tail = self.file(".log").read_text(errors="replace").splitlines()[-8:]
            print("\n".join(f"   | {line[:200]}" for line in tail), flush=True)
        return verdict == "done" and not any(
            "failed" in row or row.get("verified") is False for row in found
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="on the CPU, by the CUDA library for it")
    parser.add_argument("--stages", default=",".join(STAGES), help="default: all, in this order")
    parser.add_argument("--budget", type=float, default=465, help="seconds in all; default 465")
    parser.add_argument("--out", type=Path, help="default benchmarks/results; dry: build/gpu-dry")
    options = parser.parse_args(arguments)
    names = options.stages.split(",")
    if unknown := [name for name in names if name not in STAGES]:
        parser.error(f"unknown stages {unknown}; known are {', '.join(STAGES)}")
    if "ceilings" not in names:  # it knows the card's name, and the rates that floors need
        names.insert(0, "ceilings")
    out = options.out or (ROOT / "build" / "gpu-dry" if options.dry else HERE / "results")
    run = Run(out.resolve(), options.dry, options.budget)
    good = True
    for at, name in enumerate(names):
        left = run.end - time.monotonic() - GRACE
        share = STAGES[name] / sum(STAGES[later] for later in names[at:])
        least = STAGES[name] if name in NEEDED else 1.0
        well = run.stage(name, max(left * share, min(least, left), 1.0))
        good &= well
        if name in NEEDED:
            reasons = [r["why"] for r in run.results["stages"][name]["rows"] if "skipped" in r]
            if reasons or not well:
                print(f"   {name} is needed by all that follows: stopping. {' '.join(reasons)}")
                if reasons:  # no card: nothing to keep
                    run.discard()
                    return 1
                good = False
                break
    (run.out / "gpu-ceilings.json").unlink(missing_ok=True)
    print(report.stages(run.results) + "\n" + report.checks(run.results))
    print(report.figures(run.results))
    print(f"results: {run.file('.json')}, {run.file('.md')}, {run.file('.log')}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
