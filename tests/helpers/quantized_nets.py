"""A model whose layers are quantized in any way."""

import torch
from torch import nn

SIZES = {"a": (64, 128), "b": (128, 64), "c": (64, 64)}


class Net(nn.Module):
    def __init__(self, quantize):
        super().__init__()
        torch.manual_seed(0)
        for name, sizes in SIZES.items():
            setattr(self, name, quantize(nn.Linear(*sizes).requires_grad_(False)))

    def forward(self, x):
        return self.c(self.b(torch.tanh(self.a(x))))
