"""PEFT's own tests of RandLoRA, with stock PEFT and with our backend: ours must break none.

    git clone --depth 1 https://github.com/huggingface/peft /tmp/peft
    pip install diffusers datasets parameterized          # which these tests import
    python tools/run_peft_suite.py /tmp/peft              # as PEFT wrote them
    python tools/run_peft_suite.py /tmp/peft --sparse     # every config sparse=True: packed kernels

The source distribution holds these tests, too, instead of a checkout: `pip download --no-deps
--no-binary :all: peft==0.21.2`, unpacked, with an empty tests/__init__.py. Runs offline. Tests that
need a model of the Hub fail on both sides and cancel out. The installed PEFT is tested; with
--source that of the checkout. This file is also the plugin of those pytest runs, which puts our
backend under the tests and counts the calls of our kernels.
"""

import argparse
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
FILES = ("tests/test_randlora.py", "tests/test_custom_models.py", "tests/test_config.py")
OURS, SPARSE = "RANDLORA_SUITE_OURS", "RANDLORA_SUITE_SPARSE"  # variables for the plugin
_calls: Counter[str] = Counter()


def pytest_configure() -> None:
    """Of the plugin, before a test file is imported."""
    if os.environ.get(SPARSE):  # PEFT's tests mostly use uniform bases, which are not packed
        import peft

        init = peft.RandLoraConfig.__post_init__

        def post_init(self) -> None:
            self.sparse = not self.very_sparse
            init(self)

        peft.RandLoraConfig.__post_init__ = post_init
    if os.environ.get(OURS):
        import randlora_ext.peft
        from randlora_ext.peft.layer import AcceleratedLinear

        output = AcceleratedLinear._adapter_output

        def counted(*args, **kwargs):
            _calls["kernels"] += 1
            return output(*args, **kwargs)

        AcceleratedLinear._adapter_output = counted
        randlora_ext.peft.enable()


def pytest_terminal_summary(terminalreporter) -> None:
    terminalreporter.write_line(f"calls of our kernels: {_calls['kernels']}")


def outcomes(checkout: Path, variables: dict[str, str]) -> dict[str, str]:
    """What became of every test that was not skipped: "PASSED", "FAILED" or "ERROR"."""
    print(f"\n=== {'ours' if OURS in variables else 'stock'}", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-rpfE", "-p", "run_peft_suite", *FILES]
    # Not by PEFT's own settings, which ask for coverage.
    command += ["-c", os.devnull, "--rootdir", str(checkout), "-p", "no:cacheprovider"]
    command += ["-k", "randlora", "-W", "ignore", "--tb=line"]
    options = {"cwd": checkout, "env": os.environ | variables, "text": True}
    ended = subprocess.run(command, stdout=subprocess.PIPE, **options)
    print(ended.stdout)
    if ended.returncode not in (0, 1):
        raise SystemExit("PEFT's suite did not run to its end: see above")
    told = re.findall(r"^(PASSED|FAILED|ERROR) (\S+::.*?)(?: - .*)?$", ended.stdout, re.M)
    return {name: what for what, name in told}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=Path, help="folder with PEFT's tests/ (and src/)")
    parser.add_argument("--sparse", action="store_true", help="force sparse=True on every config")
    parser.add_argument("--source", action="store_true", help="test the checkout's own PEFT")
    options = parser.parse_args()
    checkout = options.checkout.resolve()
    if not (checkout / "tests/test_randlora.py").exists():
        parser.error(f"{checkout} has no tests/test_randlora.py")
    paths = [HERE, *[checkout / "src"] * options.source, os.environ.get("PYTHONPATH", "")]
    variables = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    variables |= {SPARSE: "1"} if options.sparse else {}
    stock, ours = (outcomes(checkout, variables | more) for more in ({}, {OURS: "1"}))
    for name, these in (("stock", stock), ("ours", ours)):
        print(name, dict(Counter(these.values())))
    changed = {n: (stock.get(n), ours.get(n)) for n in stock | ours if stock.get(n) != ours.get(n)}
    print(*(f"{name}: {a} on stock, {b} on ours" for name, (a, b) in changed.items()), sep="\n")
    if broken := [n for n, (before, _) in changed.items() if before not in ("FAILED", "ERROR")]:
        raise SystemExit(f"{len(broken)} tests are broken by randlora_ext")
    print("nothing is broken by randlora_ext")


if __name__ == "__main__":
    main()
