"""pytest plugin of run_peft_suite.py: our backend under PEFT's tests, and a record of outcomes."""

import json
import os

import peft
import pytest

OUTCOMES = "RANDLORA_SUITE_OUTCOMES"  # the file to write
BACKEND = "RANDLORA_SUITE_BACKEND"  # "stock" or "ours"
SPARSE = "RANDLORA_SUITE_SPARSE"  # "1": every RandLoRA config becomes sparse

_outcomes: dict[str, str] = {}
_calls = {"forward": 0, "kernels": 0}  # of our layers; those that ran on our kernels


def _force_sparse() -> None:
    """PEFT's tests mostly use uniform bases, which are not packed."""
    init = peft.RandLoraConfig.__post_init__

    def post_init(self) -> None:
        self.sparse = not self.very_sparse
        init(self)

    peft.RandLoraConfig.__post_init__ = post_init


def _count_calls() -> None:
    """Shows that it was our layers that the tests ran."""
    from randlora_ext.peft.layer import AcceleratedLinear

    def counting(name: str, method):
        def call(*args, **kwargs):
            _calls[name] += 1
            return method(*args, **kwargs)

        return call

    AcceleratedLinear.forward = counting("forward", AcceleratedLinear.forward)
    AcceleratedLinear._part = counting("kernels", AcceleratedLinear._part)


# At import, thus before any test file is collected.
if os.environ.get(SPARSE) == "1":
    _force_sparse()
if os.environ.get(BACKEND) == "ours":
    import randlora_ext.peft

    randlora_ext.peft.enable()
    _count_calls()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # Setup, call and teardown report one by one; the worst of them counts.
    known = _outcomes.get(report.nodeid, "passed")
    outcome = "failed" if report.failed else "skipped" if report.skipped else "passed"
    _outcomes[report.nodeid] = max(known, outcome, key=("passed", "skipped", "failed").index)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _outcomes[f"collection of {report.nodeid}"] = "failed"


def pytest_sessionfinish(session: pytest.Session) -> None:
    with open(os.environ[OUTCOMES], "w") as file:
        json.dump({"outcomes": _outcomes, "calls": _calls}, file, indent=1, sort_keys=True)
