"""compute-sanitizer's memcheck and racecheck over `small_shapes`, and a fault they must find.

The runs go side by side: nothing is timed here. Only our kernels are instrumented, and torch's
caching allocator is off, so that an access beyond a tensor is one beyond its allocation.
"""

import os
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from . import build
from .stage import Stage

_CLOSING = 2.0  # seconds to write the rows
_FAULT = 9  # exit status that compute-sanitizer gives for a finding
_MEMCHECK = ["--tool", "memcheck", "--report-api-errors", "no"]  # torch asks what it may not know
RUNS = {  # flags of the tool, arguments of small_shapes, whether there must be a finding
    "memcheck": (_MEMCHECK, [], False),
    "racecheck": (["--tool", "racecheck", "--racecheck-report", "all"], [], False),
    "planted overrun": (_MEMCHECK, ["--plant"], True),
}
_FILTER = ["--kernel-name", "kernel_substring=randlora"]


def find() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [os.path.join(home, "bin", "compute-sanitizer") for home in homes if home]
    for candidate in ["compute-sanitizer", *candidates]:
        if found := shutil.which(candidate):
            return found
    return None


def run(name: str, tool: str | None, seconds: float, kernels: list[str] = _FILTER) -> dict:
    flags, arguments, faulty = RUNS[name]
    program = [sys.executable, "-m", "gpu.small_shapes", *arguments]
    command = program + ["--dry"]
    if tool is not None:
        flags = [*flags, *kernels, "--print-limit", "20", "--launch-timeout", "120"]
        command = [tool, *flags, "--error-exitcode", str(_FAULT), *program]
    started = time.monotonic()
    status, text = build.run(command, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if "unrecognised option '--kernel-name'" in text and kernels:
        # An older tool, which then watches torch as well.
        return run(name, tool, seconds - (time.monotonic() - started), [])
    finding = status == _FAULT
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)
    calls = re.findall(r"(\d+) calls", text)
    return {
        "run": name if tool else "small shapes, without compute-sanitizer",
        "as_wanted": finding if faulty else status == 0,
        "stopped_by_time": status == 124,
        "exit_status": status,
        "summary": (summary or text.strip().splitlines() or ["nothing"])[-1][:300],
        "calls": int(calls[-1]) if calls else None,
    }


def main() -> None:
    stage = Stage(__doc__)
    tool = None if stage.dry else find()
    if tool is None and not stage.dry:
        stage.skip("memcheck, racecheck", "compute-sanitizer is not on this machine")
        return
    names = [n for n in RUNS if not (stage.dry and RUNS[n][2])]  # the CPU has nobody to catch it
    if stage.dry:
        names = names[:1]  # both would be the same run
    seconds = stage.left() - _CLOSING
    with ThreadPoolExecutor(len(names)) as pool:
        rows = list(pool.map(lambda name: run(name, tool, seconds), names))
    for row in rows:
        stage.row(**row)
    sys.exit(0 if all(row["as_wanted"] for row in rows) else 1)


if __name__ == "__main__":
    main()
