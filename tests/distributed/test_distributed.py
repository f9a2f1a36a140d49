"""DDP, FSDP2 and their checkpoints on 2 and 4 gloo processes of the CPU.

One test runs all checks, so that pytest's workers do not each start the processes.
"""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

RANKS = Path(__file__).with_name("distributed_ranks.py")
LIMIT = 900  # seconds for all checks


def test_all_checks(tmp_path):
    modules = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(RANKS), str(tmp_path)]
    ranks = subprocess.Popen(command, env=os.environ | modules, start_new_session=True)
    with contextlib.suppress(subprocess.TimeoutExpired):
        ranks.wait(LIMIT)
    with contextlib.suppress(ProcessLookupError):  # there is none left
        os.killpg(ranks.pid, signal.SIGKILL)
    ranks.wait()
    said = {output.name: output.read_text() for output in sorted(tmp_path.glob("*.txt"))}
    passed = sum(text.count(" passed in ") for text in said.values())
    tails = "\n".join(f"--- {name}\n{text[-3000:]}" for name, text in said.items())
    assert ranks.returncode == 0 and passed > 20, tails
