"""Fixtures of the GPU tests: the device that the CUDA kernels serve."""

import os

import pytest
import torch
from gpu_helpers import DRY

from randlora_ext import devices as cuda


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    """After a kernel's illegal access every CUDA call of the process fails. So the worker ends:
    xdist reports the test that was running and starts another worker for the rest.
    """
    yield
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


@pytest.fixture(autouse=True)
def one_thread():
    """Not here: what runs on the CPU for comparison is large."""


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A card; in dry mode the CPU, served by the CUDA kernels compiled for it."""
    if not DRY and not torch.cuda.is_available():
        pytest.skip("torch sees no card")
    here = torch.device("cpu") if DRY else torch.device("cuda", torch.cuda.current_device())
    if why := cuda.cuda_refusal(here):
        pytest.skip(f"the CUDA kernels are {why}")
    return here


@pytest.fixture(scope="session")
def card(device) -> torch.device:
    """For what only a card has: streams, graphs, its memory."""
    if device.type != "cuda":
        pytest.skip("needs a card; the CPU has no streams, graphs or device memory")
    return device
