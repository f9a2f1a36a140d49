"""randlora_ext.peft: nothing dense stays, and bases go with their model."""

import gc
import weakref

import pytest
import torch
from peft_helpers import accelerated, adapted, basis_of, config, layers, made, opened, peft
from torch import nn

from randlora_ext import Basis

IN, OUT, R = 200, 256, 16
DENSE = OUT * 13 * R  # numbers of B: D * n * r, which no weight has


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, IN))


def dense_tensors():
    """Ordinary tensors that are as large as a dense B."""
    gc.collect()
    return [
        tuple(thing.shape)
        for thing in gc.get_objects()
        if issubclass(type(thing), torch.Tensor)
        and type(thing) in (torch.Tensor, nn.Parameter)
        and thing.numel() >= DENSE
        and thing.is_floating_point()
    ]


def step(model):
    model(torch.randn(3, IN)).square().sum().backward()


KINDS = [{"sparse": True}, {"very_sparse": True}, {"basis": "independent"}, {"basis": "hadamard"}]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_no_dense_basis_is_alive(tmp_path, kind):
    model = adapted(Net(), "02", R, **kind)
    assert not dense_tensors() and not list(model.buffers())
    step(model)
    assert not dense_tensors()
    model.save_pretrained(tmp_path)
    model.double().float()
    model.add_adapter("two", config(R, accelerated.RandLoraConfig, "02", **kind))
    assert not dense_tensors()
    step(opened(tmp_path, Net, is_trainable=True))
    assert not dense_tensors()


def test_accelerate_drops_the_dense_bases():
    model = peft.get_peft_model(Net(), config(R, targets="02", sparse=True))
    assert dense_tensors()
    accelerated.accelerate(model)
    step(model)
    assert not dense_tensors()


@pytest.mark.parametrize("options", [{"sparse": True}, {}], ids=["packed", "uniform"])
@pytest.mark.filterwarnings("ignore")
def test_bases_go_with_their_model(options):
    def living() -> int:
        gc.collect()
        return sum(isinstance(thing, Basis) for thing in gc.get_objects())

    model = made(**options)
    model(torch.randn(2, 24))
    first = weakref.ref(basis_of(layers(model)[0]))
    for _ in range(20):  # and moves keep nothing
        model.double()(torch.randn(2, 24, dtype=torch.float64))
        model.float()(torch.randn(2, 24))
    assert 0 < living() <= (8 if options else 6)
    assert first() is not None or not options
    del model
    assert living() == 0 and first() is None
