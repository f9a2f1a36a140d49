"""Operator tests run on one thread, where they do not say otherwise."""

import pytest


@pytest.fixture(autouse=True)
def always_one_thread(one_thread):
    """In thousands of tiny calls, waking a second thread would take longer than the work.
    test_determinism.py shows that it changes no bit."""
