"""randlora_ext.peft: nothing dense stays, and nothing of the bases is sent between processes."""

import gc
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft_helpers import accelerated, config, layers, peft
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread", "stock_peft")

IN, OUT, R = 200, 256, 16
DENSE = OUT * 13 * R  # numbers of B: D * n * r, which no weight has


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, IN))


def dense_tensors():
    """Ordinary tensors in this process that are as large as a dense B."""
    gc.collect()
    return [
        tuple(thing.shape)
        for thing in gc.get_objects()
        if issubclass(type(thing), torch.Tensor)
        and type(thing) in (torch.Tensor, nn.Parameter)
        and thing.numel() >= DENSE
        and thing.is_floating_point()
    ]


def chosen(cls=None, **options):
    return config(R, cls, ["0", "2"], **options)


def step(model):
    model(torch.randn(3, IN)).square().sum().backward()


KINDS = [{"sparse": True}, {"very_sparse": True}, {"density": 0.1}, {"basis": "independent"}]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_no_dense_basis_is_alive(tmp_path, kind):
    assert not dense_tensors()
    accelerated.enable()
    model = peft.get_peft_model(Net(), chosen(accelerated.RandLoraConfig, **kind))
    assert not dense_tensors()
    step(model)
    assert not dense_tensors()
    model.save_pretrained(tmp_path)
    model.double().float()
    model.add_adapter("two", chosen(accelerated.RandLoraConfig, **kind))
    assert not dense_tensors()
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)
    step(loaded)
    assert not dense_tensors()


def test_accelerate_drops_the_dense_bases():
    model = peft.get_peft_model(Net(), chosen(sparse=True))
    assert dense_tensors()
    accelerated.accelerate(model)
    step(model)
    assert not dense_tensors()


def test_what_stays_is_small():
    """2 bits an element of B, once, where the layer takes all of it."""
    accelerated.enable()
    gc.collect()
    before = {id(thing) for thing in gc.get_objects()}
    model = peft.get_peft_model(Net(), config(R, targets=["0"], sparse=True))
    step(model)
    gc.collect()
    known = [p.data_ptr() for p in model.parameters()]
    storages = {
        thing.untyped_storage().data_ptr(): thing.untyped_storage().nbytes()
        for thing in gc.get_objects()
        if type(thing) is torch.Tensor
        and id(thing) not in before
        and not thing.is_floating_point()
        and thing.data_ptr() not in known
    }
    dense = 4 * DENSE
    assert 0 < sum(storages.values()) < dense / 10  # 2 bits for 32, and the lists of A


def test_the_bases_are_no_buffers():
    accelerated.enable()
    model = peft.get_peft_model(Net(), chosen(sparse=True))
    assert not list(model.buffers())
    assert all(not list(layer.buffers()) for layer in layers(model))


def test_two_processes(tmp_path):
    from peft_ddp_program import data, make, train

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = str(Path(__file__).with_name("peft_ddp_program.py"))
    files = [tmp_path / f"{rank}.json" for rank in range(2)]
    processes = []
    for rank, file in enumerate(files):
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        command = [sys.executable, program, str(file)]
        processes.append(subprocess.Popen(command, env=os.environ | address | place))
    try:
        assert [process.wait(timeout=200) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    results = [json.loads(file.read_text()) for file in files]
    assert results[0]["wrapped"] == "DistributedDataParallel"
    assert results[0]["parameters"] == results[1]["parameters"]
    for result in results:
        assert sorted(result["sent"]) == sorted(result["own"])  # parameters alone
    # as stock PEFT in one process with the whole batch
    accelerated.disable()
    model = make()
    assert type(model.base_model) is peft.tuners.randlora.RandLoraModel
    train(model, torch.optim.SGD(model.parameters(), lr=1e-2), data(), lambda loss: loss.backward())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            wanted = torch.tensor(results[0]["parameters"][name])
            torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-4, atol=1e-6)
