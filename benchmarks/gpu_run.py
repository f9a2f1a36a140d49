"""Builds, checks and measures on a CUDA card. Starts from a bare checkout and installs nothing.

A card that is at hand for thirty minutes, in commands of at most ten:

    python benchmarks/gpu_run.py                                    the most important, in order
    python benchmarks/gpu_run.py --stages memcheck,tests,layers
    python benchmarks/gpu_run.py --stages kernels,racecheck,ncu,slow

    build       the extension and the CUDA library in place, before every other stage
    parity      self-check; bases of every kind against float64 at 4096
    model       eager training steps of a model of the shape of Llama-3.2-3B, 840 tokens; host and
                device time apart
    hadamard    Hadamard bases beside LoRA: a layer, by size and tokens
    memcheck    compute-sanitizer on small shapes, and a fault that it must find
    tests       the GPU tests without the slowest
    layers      a layer by every method: sizes, tokens, densities
    kernels     every operator beside its floor
    racecheck   compute-sanitizer's racecheck on small shapes
    ncu         Nsight Compute: time, bytes and wavefronts of each kernel
    slow        the remaining GPU tests

A stage is one or more processes with a time limit each, so one that dies or hangs costs only
itself; it can run alone and again. Results are on disk as they come, in --out: gpu-CARD.jsonl (a
line for each result, appended by later runs), gpu-CARD.md (tables), a log for each stage.

Without a card: --stages build builds (with CUDA, for sm_90); --dry runs toy sizes on the CPU, with
the library of RANDLORA_CUDA_LIBRARY. Exit status: 0 all went well, 1 something failed, 2 something
is missing or was typed wrongly, 3 nothing failed, but the time was over before the end.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))

from gpu import report, rows  # noqa: E402
from gpu.stages import DEFAULT, PACKAGES, STAGES, Command, commands  # noqa: E402

SETUPTOOLS = 77  # the first that reads pyproject.toml's license
LEAST = 20.0  # seconds: with less left, a command is not started
LAST_WORDS = 10.0  # seconds between Ctrl-C and the end of a command that takes too long


def environment(dry: bool) -> dict[str, str]:
    # ninja lies beside Python; torch's builds look for it on PATH.
    programs = [str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    paths = [str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]
    new = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1",
           "PATH": os.pathsep.join(filter(None, programs)), "HF_HUB_OFFLINE": "1"}  # fmt: skip
    if dry:
        new |= {"RANDLORA_CUDA_SERVES_CPU": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **new}


def missing(stages: list[str]) -> list[str]:
    """What the stages need of Python's packages and is not there, as pip calls it."""
    wanted = dict.fromkeys(name for stage in stages for name in PACKAGES.get(stage, ()))
    found = [
        name
        for name in ("torch", *wanted)
        if importlib.util.find_spec(name) is None
        and not (name == "ninja" and shutil.which(name, path=environment(False)["PATH"]))
    ]
    if "setuptools" in wanted:
        version = "0" if "setuptools" in found else importlib.metadata.version("setuptools")
        if int(version.partition(".")[0]) < SETUPTOOLS:
            others = [name for name in found if name != "setuptools"]
            found = [f"'setuptools>={SETUPTOOLS}'", *others]
    return found


def commit() -> str:
    with contextlib.suppress(OSError):  # no git
        argv = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return ""


def card_at_hand(dry: bool) -> dict:
    """What gpu/ceilings.py finds; "card" is missing if there is no card."""
    argv = [sys.executable, "-m", "gpu.ceilings", *["--dry"] * dry]
    done = subprocess.run(argv, cwd=ROOT, env=environment(dry), text=True, timeout=300,
                          stdout=subprocess.PIPE, check=True)  # fmt: skip
    return json.loads(done.stdout.strip().splitlines()[-1])


class Run:
    """The files of one card, and the time that is left."""

    def __init__(
        self, out: Path, card: dict, dry: bool, seconds: float, built: bool = False
    ) -> None:
        out.mkdir(parents=True, exist_ok=True)
        name = card.get("card", "no card").lower().replace("nvidia", "")
        self.stem = out / ("gpu-" + re.sub(r"[^a-z0-9]+", "-", "dry" if dry else name).strip("-"))
        self.card, self.dry, self.built = card, dry, built
        self.end = time.monotonic() + seconds
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.add(stage="run", date=date, commit=commit(), **card)

    def file(self, suffix: str) -> Path:
        return self.stem.with_name(self.stem.name + suffix)

    def add(self, **values: object) -> None:
        with self.file(".jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")

    def commands(self, stage: str) -> list[Command]:
        made = commands(stage, self.card, self.dry, self.file("-ncu.csv"))
        return [command for command in made if not (self.built and command.name == "build")]

    def stage(self, name: str) -> str:
        """Runs the commands of a stage; returns its outcome."""
        print(f"== {name}", flush=True)
        self.add(stage=name, begins=True)
        for command in self.commands(name):
            self.command(name, command)
        return self.report(name)

    def leave_out(self, name: str, why: str) -> str:
        print(f"== {name}", flush=True)
        self.add(stage=name, begins=True)
        self.add(stage=name, skipped=name, why=why)
        return self.report(name)

    def report(self, name: str) -> str:
        found = report.read(self.file(".jsonl"))
        self.file(".md").write_text(report.markdown(found))
        print(report.of_stage(name, found), flush=True)
        return report.outcome(name, found)

    def command(self, stage: str, command: Command) -> None:
        seconds = min(command.seconds, self.end - time.monotonic())
        watched = [] if self.dry else command.watched
        why = ""
        if watched and not shutil.which(watched[0], path=environment(self.dry)["PATH"]):
            why = f"{watched[0]} is not on PATH"
        elif self.dry and command.card_only:
            why = "only on a card"
        elif seconds < LEAST:
            why = rows.OUT_OF_TIME
        if why:
            self.add(stage=stage, skipped=command.name, why=why)
            return
        argv, began = [*watched, *command.argv], time.monotonic()
        settings = environment(self.dry) | command.settings
        settings |= rows.environment(str(self.file(".jsonl")), stage, seconds)
        path = self.file(f"-{stage}.log")
        with path.open("a", errors="replace") as log:
            print(f"\n==== {' '.join(argv)}", file=log, flush=True)
            at = log.tell()
            process = subprocess.Popen(argv, cwd=ROOT, env=settings, stdout=log,
                                       stderr=log, start_new_session=True)  # fmt: skip
        try:
            status = process.wait(seconds)
            verdict = "ok" if status == command.expected else f"exit status {status}"
        except subprocess.TimeoutExpired:
            verdict = f"{report.STOPPED} {seconds:.0f} s"
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGINT)  # pytest then says what has failed
                process.wait(timeout=LAST_WORDS)
        finally:  # also what it leaves running, which would disturb the next
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        with path.open(errors="replace") as log:
            log.seek(at)
            said = [line for line in log.read().splitlines() if not line.startswith('{"stage"')]
        self.add(stage=stage, command=command.name, verdict=verdict,
                 seconds=round(time.monotonic() - began, 1),
                 said=said[-1][:200] if said else "")  # fmt: skip
        if verdict != "ok":
            print("\n".join(f"   | {line[:200]}" for line in said[-20:]), flush=True)


def run_all(run: Run, names: list[str]) -> dict[str, str]:
    """The outcome of each stage, in order."""
    outcomes: dict[str, str] = {}
    for name in names:
        if outcomes.get("build", "ok") == "ok":
            outcomes[name] = run.stage(name)
        else:
            outcomes[name] = run.leave_out(name, report.NOT_BUILT)
    return outcomes


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", default=",".join(DEFAULT),
                        help=f"all, or of {','.join(STAGES)}; default %(default)s")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=9, help="for all of it; default 9")
    parser.add_argument(
        "--out", type=Path, help="default benchmarks/results; build/gpu-run without a card"
    )
    parser.add_argument("--built", action="store_true",
                        help="the libraries are here, built from this source")  # fmt: skip
    parser.add_argument("--dry", action="store_true", help="toy sizes on the CPU")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.minutes * 60
    asked = set(STAGES if options.stages == "all" else options.stages.split(","))
    if unknown := asked - set(STAGES):
        parser.error(f"unknown stages {sorted(unknown)}; known are {', '.join(STAGES)}")
    asked |= {"build"}  # one that is up to date takes seconds; what is built must load
    names = [name for name in STAGES if name in asked]
    if lacking := missing([name for name in names if name != "build" or not options.built]):
        print(f"missing: pip install {' '.join(lacking)}")
        return 2
    card = card_at_hand(options.dry)
    no_card = f"torch {card['torch']} sees no CUDA card"
    if "card" not in card and names != ["build"]:
        print(f"{no_card}; without one only --stages build and --dry work")
        return 2
    measures = "card" in card and not options.dry
    out = options.out or (HERE / "results" if measures else ROOT / "build" / "gpu-run")
    run = Run(out.resolve(), card, options.dry, end - time.monotonic(), options.built)
    outcomes = run_all(run, names)
    print(report.table(["stage", "outcome"], outcomes.items()))
    print("results:", *(str(run.file(suffix)) for suffix in (".jsonl", ".md", "-*.log")))
    if "card" not in card:
        print(
            no_card + ("" if card["cuda"] else ", as it was made without CUDA: CPU kernels alone")
        )
    if "failed" in outcomes.values():
        return 1
    return 3 if report.EARLY in outcomes.values() else 0


if __name__ == "__main__":
    sys.exit(main())
