"""A model whose layers are quantized in any way."""

import pytest
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


def by_bitsandbytes(bits, dtype=torch.float32):
    """In 8 or 4 bits; 4 bits compute in `dtype`."""
    bnb = pytest.importorskip("bitsandbytes")

    def quantize(linear):
        sizes = linear.in_features, linear.out_features
        if bits == 8:
            layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        else:
            layer = bnb.nn.Linear4bit(*sizes, quant_type="nf4", compute_dtype=dtype)
        layer.load_state_dict(linear.to(dtype).state_dict())
        return layer

    net = Net(quantize)
    setattr(net, f"is_loaded_in_{bits}bit", True)  # as transformers marks its models
    return net.to("cpu")  # quantizes
