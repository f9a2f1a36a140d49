"""A process that is killed while it saves leaves a complete adapter, the old or the new one."""

import json
import os
import subprocess
import sys
from pathlib import Path

from property_cases import DEEP

HERE = Path(__file__).resolve().parent


def test_killed_saves():
    step, trials = ("1", "200") if DEEP else ("67", "8")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "killed_saves_program.py"), step, trials],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=3600 if DEEP else 300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    kills = {name: counts["killed"] for name, counts in map(json.loads, done.stdout.splitlines())}
    assert len(kills) == 5 and min(kills.values()) >= 8, kills
