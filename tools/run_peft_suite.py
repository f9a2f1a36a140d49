"""PEFT's own tests of RandLoRA, with stock PEFT and with our backend: ours must break none.

    git clone --depth 1 https://github.com/huggingface/peft /tmp/peft
    pip install diffusers datasets parameterized          # which these tests import
    python tools/run_peft_suite.py /tmp/peft              # as PEFT wrote them
    python tools/run_peft_suite.py /tmp/peft --sparse     # every config sparse=True: packed kernels

Runs offline. Tests that need a model of the Hub fail on both sides and cancel out. The installed
PEFT is tested; with --source that of the checkout. This file is also the plugin of those pytest
runs: it puts our backend under the tests, and records outcomes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
RUNS = (  # (test file, -k)
    ("tests/test_randlora.py", None),
    ("tests/test_custom_models.py", "randlora"),
    ("tests/test_config.py", "randlora"),
)
# Variables for the plugin: the file to write; "stock" or "ours"; "1" if configs become sparse.
OUTCOMES, BACKEND, SPARSE = (f"RANDLORA_SUITE_{n}" for n in ("OUTCOMES", "BACKEND", "SPARSE"))

# ---- the plugin

_outcomes: dict[str, str] = {}
_calls = {"forward": 0, "kernels": 0}  # of our layers; those that ran on our kernels


def _force_sparse() -> None:
    """PEFT's tests mostly use uniform bases, which are not packed."""
    import peft

    init = peft.RandLoraConfig.__post_init__

    def post_init(self) -> None:
        self.sparse = not self.very_sparse
        init(self)

    peft.RandLoraConfig.__post_init__ = post_init


def _enable_and_count() -> None:
    """Counts calls to show that it was our layers that the tests ran."""
    import randlora_ext.peft
    from randlora_ext.peft.layer import AcceleratedLinear

    def counting(name: str, method):
        def call(*args, **kwargs):
            _calls[name] += 1
            return method(*args, **kwargs)

        return call

    randlora_ext.peft.enable()
    AcceleratedLinear.forward = counting("forward", AcceleratedLinear.forward)
    AcceleratedLinear._part = counting("kernels", AcceleratedLinear._part)


# At import, thus before any test file is collected.
if os.environ.get(SPARSE) == "1":
    _force_sparse()
if os.environ.get(BACKEND) == "ours":
    _enable_and_count()


def pytest_runtest_logreport(report) -> None:
    # Setup, call and teardown report one by one; the worst of them counts.
    known = _outcomes.get(report.nodeid, "passed")
    _outcomes[report.nodeid] = max(known, report.outcome, key=("passed", "skipped", "failed").index)


def pytest_collectreport(report) -> None:
    if report.failed:
        _outcomes[f"collection of {report.nodeid}"] = "failed"


def pytest_sessionfinish() -> None:
    Path(os.environ[OUTCOMES]).write_text(json.dumps({"outcomes": _outcomes, "calls": _calls}))


# ---- the runs


def run_suite(checkout: Path, backend: str, sparse: bool, source: bool) -> tuple[dict, Counter]:
    """Outcome ("passed", "failed", "skipped") of every test, and how often our layers ran."""
    outcomes, calls = {}, Counter()
    paths = [str(HERE), *([str(checkout / "src")] if source else [])]
    for file, keyword in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            record, ini = Path(folder, "outcomes.json"), Path(folder, "pytest.ini")
            ini.write_text("[pytest]\n")  # PEFT's own asks for coverage
            environment = {"OMP_NUM_THREADS": "1"} | os.environ
            environment |= {
                OUTCOMES: str(record),
                BACKEND: backend,
                SPARSE: "1" if sparse else "0",
                "HF_HUB_OFFLINE": "1",
                "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
            }
            command = [sys.executable, "-m", "pytest", "-q", "-p", "run_peft_suite"]
            command += ["-c", str(ini), "--rootdir", str(checkout), "-p", "no:cacheprovider"]
            command += ["-W", "ignore", "--tb=line", file]
            command += ["-k", keyword] if keyword else []
            print(f"\n=== {backend}: {file}" + (f" -k {keyword}" if keyword else ""), flush=True)
            subprocess.run(command, cwd=checkout, env=environment, check=False)
            if not record.exists():
                raise SystemExit(f"{file} did not run to its end on {backend}")
            result = json.loads(record.read_text())
        outcomes |= result["outcomes"]
        calls.update(result["calls"])
        if backend == "stock" and any(name.startswith("collection") for name in outcomes):
            raise SystemExit(f"{file} cannot be imported: see above for what is missing")
    return outcomes, calls


def compare(stock: dict[str, str], ours: dict[str, str]) -> list[str]:
    """What ours breaks: tests that stock passes or skips and ours does not."""
    broken = []
    for name in sorted(stock.keys() | ours.keys()):
        before, after = stock.get(name, "not run"), ours.get(name, "not run")
        if before != after:
            print(f"{name}: {before} on stock, {after} on ours")
            if before != "failed":
                broken.append(name)
    return broken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=Path, help="folder with PEFT's tests/ (and src/)")
    parser.add_argument("--sparse", action="store_true", help="force sparse=True on every config")
    parser.add_argument("--source", action="store_true", help="test the checkout's own PEFT")
    options = parser.parse_args()
    checkout = options.checkout.resolve()
    if not (checkout / "tests/test_randlora.py").exists():
        parser.error(f"{checkout} has no tests/test_randlora.py")
    stock, ours = (
        run_suite(checkout, backend, options.sparse, options.source)
        for backend in ("stock", "ours")
    )
    for backend, (outcomes, _) in (("\nstock", stock), ("ours", ours)):
        counts = Counter(outcomes.values())
        parts = [f"{counts[kind]} {kind}" for kind in ("passed", "failed", "skipped")]
        print(f"{backend}: {', '.join(parts)}")
    calls = ours[1]
    print(f"our layers ran {calls['forward']} times, {calls['kernels']} of them on our kernels")
    if not calls["forward"] or not calls["kernels"]:
        raise SystemExit("so the tests did not test randlora_ext")
    if broken := compare(stock[0], ours[0]):
        raise SystemExit(f"{len(broken)} tests are broken by randlora_ext")
    print("nothing is broken by randlora_ext")


if __name__ == "__main__":
    main()
