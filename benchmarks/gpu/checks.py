"""The tests of tests/gpu on the card; with --dry a few of them on the CPU library."""

import importlib.util
import os
import re
import subprocess
import sys
import threading
import time

from .build import ROOT
from .stage import Stage

# "tests/x.py::name PASSED [ 5%]", or of xdist "[gw0] [ 5%] PASSED tests/x.py::name"
_RESULT = re.compile(r"(?:(\S+::.*?) )?(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b(?: (\S+::.*))?")


def main() -> None:
    stage = Stage(__doc__)
    # The dry run tries this stage; all of them run on the CPU by tests/cuda/run_python_tests.sh.
    names = ["test_gpu_layer.py", "test_gpu_runtime.py"] if stage.dry else [""]
    files = [f"tests/gpu/{name}" for name in names]
    command = [sys.executable, "-m", "pytest", *files, "-o", "addopts=", "-v", "-rf"]
    command += ["-p", "no:cacheprovider", "--maxfail=30", "--tb=short"]
    if not stage.dry and importlib.util.find_spec("xdist"):
        command += ["-n", "4"]  # the oracles run on the CPU and take most of the time
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // 4, 1)))
    started = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    watch = threading.Timer(stage.left(), process.kill)
    watch.start()
    counts: dict[str, int] = {}
    broken: list[str] = []
    for line in process.stdout:
        print(line, end="", flush=True)
        found = _RESULT.search(line)
        if found and not line.startswith(("FAILED", "ERROR", "=")):
            counts[found[2].lower()] = counts.get(found[2].lower(), 0) + 1
            if found[2] in ("FAILED", "ERROR"):
                broken.append(found[1] or found[3] or line.strip())
    status = process.wait()
    late = not watch.is_alive() and status < 0
    watch.cancel()
    stage.row(
        counts=counts, broken=broken, stopped_by_time=late, exit_status=status,
        seconds=time.monotonic() - started,
    )  # fmt: skip
    sys.exit(0 if status == 0 else 1)


if __name__ == "__main__":
    main()
