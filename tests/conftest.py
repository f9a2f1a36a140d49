"""Fixtures that several test files use."""

import os

# Before torch: a thread that waits for others leaves its core to them, and to the other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

# In thousands of tiny calls, waking a second thread would take longer than the work.
# ops/test_determinism.py shows that it changes no bit of ours; it may of torch's. At once, because
# fixtures of a whole file come before those of a test.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread():
    yield
    torch.set_num_threads(1)


@pytest.fixture
def stock_peft():
    """Starts from stock PEFT and leaves it behind, whatever the test enables."""
    pytest.importorskip("peft")
    from randlora_ext.peft import disable

    disable()
    yield
    disable()
