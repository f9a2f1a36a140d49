"""Layers and models to calibrate."""

import torch
from layer_helpers import adapt, randomize, uneven
from torch import nn

from randlora_ext import RandLoraLinear, calibrate


def layer_of(in_features=24, out_features=40, **options):
    torch.manual_seed(0)
    return RandLoraLinear(nn.Linear(in_features, out_features), r=5, **options)


class Net(nn.Module):
    """Two layers, one of which is called twice, and dropout, which must not act."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(24, 40), nn.Linear(40, 24)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, attention_mask=None):
        return self.two(torch.tanh(self.one(self.two(self.drop(self.one(x))))))


def net(**options):
    return adapt(Net(), "one", "two", r=5, basis="hadamard", **options)


def calibrated():
    model = net()
    calibrate(model, [uneven(9)])
    return randomize(model)
