"""Adapted layers of every sort to merge and unmerge, and the bits of what they merge into."""

import itertools
import sys

import pytest
import torch
from layer_helpers import make_base, randomize
from torch import nn

from randlora_ext import RandLoraLinear


class Plain:
    """A RandLoraLinear without PEFT. The other sorts have the same attributes and methods."""

    def __init__(self, dtype=torch.float32):
        base = make_base(24, 40, dtype=dtype)
        self.model = nn.Sequential(randomize(RandLoraLinear(base, r=5, density=0.3, seed=1)))
        self.layer = self.model[0]

    @property
    def weight(self):
        return self.layer._base_weight()

    def bits(self):
        """Those of W: equal numbers may differ in the sign of zero, and NaN equals nothing."""
        return bits_of(self.weight)

    def merge(self):
        self.layer.merge()

    def inputs(self):
        return torch.randn(3, self.layer.in_features).to(self.weight.dtype)


class OfPeft(Plain):
    """Two active adapters, "default" and "two"."""

    def __init__(self, dtype=torch.float32):
        peft_helpers = pytest.importorskip("peft_helpers")
        base = nn.Sequential(make_base(24, 40, dtype=dtype))
        self.model = peft_helpers.adapted(base, ["0"], sparse=True)
        second = peft_helpers.config(5, targets=["0"], sparse=True, randlora_alpha=50)
        self.model.add_adapter("two", second)
        self.model.base_model.set_adapter(["default", "two"])
        (self.layer,) = peft_helpers.layers(peft_helpers.randomize(self.model))

    def merge(self, names=None):
        self.layer.merge(adapter_names=names)


def by_each_expert(x, stack):
    return x @ stack.mT


class OfExperts(Plain):
    """A stack of experts under PEFT."""

    def __init__(self, dtype=torch.float32):
        peft_experts = pytest.importorskip("peft_experts")
        torch.manual_seed(0)
        base = nn.Sequential(peft_experts.Mixture(by_each_expert)).to(dtype)
        options = {"basis": "hadamard", "target_parameters": ["0.up"]}
        self.model = peft_experts.adapted(base, [], 4, **options)
        (self.layer,) = (m for m in self.model.modules() if hasattr(m, "merged_adapters"))


class Quantized(Plain):
    """Of 8 or 4 bits by bitsandbytes, under PEFT."""

    def __init__(self, bits):
        peft_helpers = pytest.importorskip("peft_helpers")
        from quantized_nets import by_bitsandbytes

        self.model = peft_helpers.adapted(by_bitsandbytes(bits), ["a"], sparse=True).eval()
        (self.layer,) = peft_helpers.layers(self.model)

    def bits(self):
        base = self.layer.get_base_layer()
        tensors = base.state_dict().values()  # puts back the order of inference on the CPU
        return torch.cat([bits_of(t).flatten() for t in tensors if isinstance(t, torch.Tensor)])

    def inputs(self):
        return torch.randn(3, self.layer.in_features)


FLOATING = {"plain": Plain, "PEFT": OfPeft, "experts": OfExperts}
ALL = FLOATING | {f"{bits} bits": lambda bits=bits: Quantized(bits) for bits in (8, 4)}


def bits_of(tensor):
    return tensor.detach().contiguous().flatten().view(torch.uint8).clone()


def learn(layer, seed):
    """Other numbers of about the same size in every adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for diagonals in (layer.randlora_lambda, layer.randlora_gamma):
            for p in diagonals.values():
                p.mul_(1 + torch.randn(p.shape, generator=generator).to(p.dtype) / 2)


def interrupts(call, watched="randlora", event="line"):
    """Calls repeatedly, with Ctrl-C before the first, second, ... line of watched files, or before
    every instruction of Python's machine if `event` is "opcode".

    Yields after each interrupt; the caller puts everything back for the next.
    """
    for at in itertools.count(1):
        seen = 0

        def trace(frame, what, argument, at=at):
            nonlocal seen
            if watched not in frame.f_code.co_filename:
                return None
            frame.f_trace_opcodes = event == "opcode"
            seen += what == event
            if what == event and seen == at:
                raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            call()
            return
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        yield at
