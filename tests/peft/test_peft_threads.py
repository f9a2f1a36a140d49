"""randlora_ext.peft: one model called by several threads."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from peft_helpers import adapted, config, made, randomize
from torch import nn


def by_threads(work, jobs):
    """The results of all jobs, which threads begin at the same moment."""
    start = threading.Barrier(len(jobs))

    def run(job):
        start.wait()
        with torch.no_grad():
            return [work(job) for _ in range(20)]

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(run, jobs))


class SlowExperts(nn.Module):
    """Lets other threads run between its two products."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = (nn.Parameter(torch.randn(3, 24, 24)) for _ in range(2))

    def forward(self, x):
        up = torch.einsum("ti,eoi->to", x, self.up)
        time.sleep(1e-3)
        return torch.einsum("ti,eoi->to", up, self.down)


def with_slow_experts():
    chosen = {"basis": "hadamard", "target_parameters": ["0.up", "0.down"]}
    return adapted(nn.Sequential(SlowExperts()), [], 4, **chosen)


def test_threads_that_share_adapted_experts():
    model = with_slow_experts()
    x = torch.randn(5, 24)
    alone = model(x)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    for results in by_threads(lambda _: model(x), range(4)):
        assert all(torch.equal(y, alone) for y in results)
    now = dict(model.named_parameters())
    assert now.keys() == weights.keys()
    assert all(torch.equal(now[name], weights[name]) for name in weights)


def test_a_process_that_is_forked_while_a_thread_is_in_adapted_experts():
    model = with_slow_experts()
    x = torch.randn(5, 24)
    with torch.no_grad():
        alone = model(x)
    runs = threading.Event()
    runs.set()

    def call_again_and_again():
        while runs.is_set():
            with torch.no_grad():
                model(x)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(call_again_and_again)
        time.sleep(0.05)
        child = os.fork()
        if not child:
            signal.alarm(30)  # ends a child that hangs
            with torch.no_grad():
                os._exit(0 if torch.equal(model(x), alone) else 1)
        runs.clear()
    assert os.waitpid(child, 0)[1] == 0


def test_each_thread_has_its_own_adapters_by_row():
    model = made(basis="hadamard")
    model.add_adapter("two", config(5))
    randomize(model).eval()
    x = torch.randn(2, 24)
    batches = [["default", "two"], ["two", "default"], ["__base__", "two"], None]
    alone = [model(x, adapter_names=names) for names in batches]
    model.base_model.model.a.register_forward_hook(lambda *_: time.sleep(1e-3))
    together = by_threads(lambda k: model(x, adapter_names=batches[k]), range(4))
    for expected, results in zip(alone, together, strict=True):
        assert all(torch.equal(y, expected) for y in results)
