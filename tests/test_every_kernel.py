"""tests/cuda/every_kernel.py, which ends the execution gate, fails where a kernel did not run."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "cuda" / "every_kernel.py"


def test_kernels_that_no_test_started_are_named(tmp_path):
    (tmp_path / "one.txt").write_text("")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "no test started fill_planes_kernel" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("0 of ")
