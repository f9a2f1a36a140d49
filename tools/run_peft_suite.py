"""PEFT's own tests of RandLoRA, with stock PEFT and with our backend: ours must break none.

    git clone --depth 1 https://github.com/huggingface/peft /tmp/peft
    pip install diffusers datasets parameterized          # which these tests import
    python tools/run_peft_suite.py /tmp/peft              # as PEFT wrote them
    python tools/run_peft_suite.py /tmp/peft --sparse     # every config sparse=True: packed kernels

Runs offline. Tests that need a model of the Hub fail on both sides and cancel out. The installed
PEFT is tested; with --source that of the checkout.
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


def run_suite(checkout: Path, backend: str, sparse: bool, source: bool) -> tuple[dict, Counter]:
    """Outcome ("passed", "failed", "skipped") of every test, and how often our layers ran."""
    outcomes, calls = {}, Counter()
    for file, keyword in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            record = Path(folder) / "outcomes.json"
            ini = Path(folder) / "pytest.ini"  # PEFT's own asks for coverage
            ini.write_text("[pytest]\n")
            paths = [str(HERE), *([str(checkout / "src")] if source else [])]
            environment = os.environ | {
                "RANDLORA_SUITE_OUTCOMES": str(record),
                "RANDLORA_SUITE_BACKEND": backend,
                "RANDLORA_SUITE_SPARSE": "1" if sparse else "0",
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
                "PYTHONPATH": os.pathsep.join(paths + [os.environ.get("PYTHONPATH", "")]),
            }
            command = [sys.executable, "-m", "pytest", "-q", "-p", "peft_suite_plugin"]
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
    results = {
        backend: run_suite(checkout, backend, options.sparse, options.source)
        for backend in ("stock", "ours")
    }
    print()
    for backend, (outcomes, _) in results.items():
        counts = Counter(outcomes.values())
        parts = [f"{counts[kind]} {kind}" for kind in ("passed", "failed", "skipped")]
        print(f"{backend}: {', '.join(parts)}")
    calls = results["ours"][1]
    print(f"our layers ran {calls['forward']} times, {calls['kernels']} of them on our kernels")
    if not calls["forward"] or not calls["kernels"]:
        raise SystemExit("so the tests did not test randlora_ext")
    broken = compare(results["stock"][0], results["ours"][0])
    if broken:
        raise SystemExit(f"{len(broken)} tests are broken by randlora_ext")
    print("nothing is broken by randlora_ext")


if __name__ == "__main__":
    main()
