"""DDP, FSDP2 and their checkpoints on 2 and 4 gloo processes of the CPU.

One test runs all checks, so that pytest's workers do not each start the processes.
"""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

RANKS = Path(__file__).with_name("distributed_ranks.py")
LIMIT = 900  # seconds for all checks


def test_all_checks(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(RANKS), str(tmp_path)]
    said = tmp_path / "said.txt"
    with said.open("w") as out:
        to = {"stdout": out, "stderr": subprocess.STDOUT, "start_new_session": True}
        ranks = subprocess.Popen(command, env=environment, **to)
    with contextlib.suppress(subprocess.TimeoutExpired):
        ranks.wait(LIMIT)
    with contextlib.suppress(ProcessLookupError):  # there is none left
        os.killpg(ranks.pid, signal.SIGKILL)
    ranks.wait()
    told = said.read_text()
    assert ranks.returncode == 0 and told.count(" passed\n") > 20, told[-9000:]
