"""A process that is killed while it saves leaves a complete adapter, the old or the new one."""

import json
import os
import subprocess
import sys
from pathlib import Path

from property_cases import DEEP

PROGRAM = Path(__file__).with_name("killed_saves_program.py")


def test_killed_saves():
    step, trials = ("1", "200") if DEEP else ("211", "8")
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    settings["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-W", "ignore", PROGRAM, step, trials]
    options = {"env": os.environ | settings, "timeout": 3600 if DEEP else 600}
    done = subprocess.run(command, **options, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    kills = {name: counts["killed"] for name, counts in map(json.loads, done.stdout.splitlines())}
    assert len(kills) == 5 and min(kills.values()) >= 8, kills
