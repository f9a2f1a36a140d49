"""Results: one line of JSON each, on disk as soon as it is made, so that a killed stage keeps them.

`gpu_run.py` sets the three variables; a stage that is run by hand prints its rows and has no limit.
"""

import json
import os
import time

OUT_OF_TIME = "out of time"
_FILE, _STAGE, _DEADLINE = "RANDLORA_ROWS", "RANDLORA_STAGE", "RANDLORA_DEADLINE"


def environment(file: str, stage: str, seconds: float) -> dict[str, str]:
    """For a stage's process: where its rows go, its name, and the seconds that it has."""
    return {_FILE: file, _STAGE: stage, _DEADLINE: str(time.time() + seconds)}


def row(**values: object) -> None:
    text = json.dumps({"stage": os.environ.get(_STAGE, ""), **values}, default=str)
    if path := os.environ.get(_FILE):
        with open(path, "a") as file:
            file.write(text + "\n")
    print(text, flush=True)


def failed(what: str, error: BaseException) -> None:
    """Records a part that failed, and what led to its error. The stage goes on."""
    why = f"{type(error).__name__}: {error}"[:300]
    before = {"after": repr(error.__context__)[:300]} if error.__context__ else {}
    row(failed=what, why=why, **before)


def skipped(what: str, why: str = OUT_OF_TIME) -> None:
    row(skipped=what, why=why)


def seconds_left() -> float:
    deadline = os.environ.get(_DEADLINE)
    return float(deadline) - time.time() if deadline else float("inf")
