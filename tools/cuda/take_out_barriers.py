"""Is every barrier of a kernel needed, and would the execution gate see that it is missing?

    python tools/cuda/take_out_barriers.py a_down.cu a_side     # a file in csrc/cuda, and its test

Takes each __syncthreads, __syncwarp and cp_async_wait out of the file, one at a time, in a copy of
the repository: the test must fail under TSan. Exit status 1 if a change went unseen.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
WAIT = re.compile(r"^\s*(__syncthreads\(\)|__syncwarp\(\)|cp_async_wait<.*>\(\));", re.MULTILINE)


def passes(copy: Path, test: str) -> bool:
    build = copy / "build-tsan"
    configure = ["cmake", "-S", copy, "-B", build]
    quiet = {"stdout": subprocess.DEVNULL, "check": True}
    subprocess.run([*configure, "-DRANDLORA_SANITIZE=thread", "-DRANDLORA_SANITIZE_CPU="], **quiet)
    subprocess.run(["cmake", "--build", build, "--target", f"test_cuda_{test}"], **quiet)
    options = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run([build / f"test_cuda_{test}"], env=options, capture_output=True)
    return done.returncode == 0


def main() -> int:
    name, test = sys.argv[1:]
    unseen = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("build*", ".*"))
        source = next((copy / "csrc/cuda").rglob(name))
        text = source.read_text()
        if not passes(copy, test):
            sys.exit(f"{test} fails as it is")
        for place in WAIT.finditer(text):
            source.write_text(text[: place.start(1)] + text[place.end() :])  # with its semicolon
            missed = passes(copy, test)
            line = text.count("\n", 0, place.start(1)) + 1
            print(f"{name}:{line}: {place[1]}: {'UNSEEN' if missed else 'seen'}", flush=True)
            unseen += missed
    print(f"{unseen} went unseen")
    return unseen > 0


if __name__ == "__main__":
    sys.exit(main())
