"""One layer used from several threads and forked processes at a time."""

import faulthandler
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from layer_cases import run_python
from layer_helpers import inputs, make_base, randomize, run
from torch.utils.data import DataLoader

from randlora_ext import Basis, RandLoraLinear
from randlora_ext.basis import cache

BASES = ({"density": 1 / 3}, {"density": 0.07}, {"basis": "hadamard"})


def make_layer(**options):
    options = {"basis": "independent"} | options
    return randomize(RandLoraLinear(make_base(130, 70), r=9, **options))


@pytest.mark.parametrize("torch_threads", [1, 4])
@pytest.mark.parametrize("options", BASES, ids=str)
def test_python_threads_get_the_bits_of_one(options, torch_threads):
    torch.set_num_threads(torch_threads)
    layer = make_layer(**options)
    cases = [inputs(layer, tokens, seed=tokens) for tokens in (1, 3, 16, 40, 65, 130)]
    alone = [run(layer, *case) for case in cases]
    fresh = make_layer(**options)  # its basis is packed by whoever comes first
    start = threading.Barrier(4)

    def work(worker):
        # Our kernels give the same bits for any number, but MKL's GEMM of the base does not, and in
        # a new thread it takes OpenMP's number until torch is told.
        torch.set_num_threads(torch_threads)
        start.wait()
        order = range(worker, worker + 24)
        return [(k % len(cases), run(fresh, *cases[k % len(cases)])) for k in order]

    with ThreadPoolExecutor(4) as pool:
        outcomes = [result for results in pool.map(work, range(4)) for result in results]
    assert len(outcomes) == 96
    for k, results in outcomes:
        assert all(torch.equal(a, b) for a, b in zip(results, alone[k], strict=True))


def test_threads_that_make_and_drop_layers():
    # The cache of packed bases is filled and emptied by all of them at once.
    def drawn(seed):
        return Basis(40, 30, 4, 0.3, seed % 3).dense()[1]

    expected = [drawn(seed) for seed in range(3)]

    def work(worker):
        return all(torch.equal(drawn(k), expected[k % 3]) for k in range(worker, worker + 60))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))


# ---- Processes, by this file run as a program: a child forked from pytest's process may wait for a
# lock that some thread of another test held. That program has OpenMP's threads only.


def fork_while_another_thread_packs():
    inside, leave = threading.Event(), threading.Event()

    def make():
        inside.set()
        leave.wait()
        return []

    wanted = ("a slow one",), torch.device("cpu"), make
    thread = threading.Thread(target=cache.get_or_make, args=wanted)
    thread.start()
    inside.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # in case it waits for a thread that it does not have
        Basis(16, 16, 4, 0.3).packed()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    leave.set()
    thread.join()


def data_loader_beside_and_with_a_layer_of_the_parent():
    torch.set_num_threads(2)
    layer = make_layer(density=0.07)
    x, dy = inputs(layer, 24, 20)
    expected = layer(x).detach()
    before = run(layer, x, dy)  # OpenMP's threads exist by now

    def in_a_worker(rows):  # frozen feature extraction in a loader
        with torch.no_grad():
            return layer(torch.stack(rows))

    loader = DataLoader(
        x, 4, collate_fn=in_a_worker, num_workers=2, multiprocessing_context="fork", timeout=90,
        worker_init_fn=lambda worker: faulthandler.dump_traceback_later(60),  # where it hangs
    )  # fmt: skip
    batches = []
    for batch in loader:
        batches.append(batch)
        results = run(layer, x, dy)  # the parent goes on training
        assert all(torch.equal(a, b) for a, b in zip(results, before, strict=True))
    torch.testing.assert_close(torch.cat(batches), expected)


def test_forked_processes():
    run_python(__file__)


if __name__ == "__main__":
    torch.set_num_threads(1)
    fork_while_another_thread_packs()
    data_loader_beside_and_with_a_layer_of_the_parent()
