"""Layers with random diagonals, and their results by the plain PyTorch reference."""

import io
import statistics

import pytest
import torch
from layer_cases import relative as relative
from layer_cases import scaled_matrices
from torch import nn
from torch.nn import functional as F

from randlora_ext import RandLoraLinear
from randlora_ext.reference import linear_reference


def make_base(in_features, out_features, layer_type="linear", bias=True, dtype=torch.float32):
    torch.manual_seed(in_features * 1000 + out_features)
    if layer_type == "conv1d":
        Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
        base = Conv1D(out_features, in_features)
        nn.init.normal_(base.bias)
    elif layer_type == "subclass":
        base = type("Special", (nn.Linear,), {})(in_features, out_features, bias=bias)
    else:
        base = nn.Linear(in_features, out_features, bias=bias)
    return base.to(dtype)


def layers(model):
    """Our layers by their paths."""
    return {path: m for path, m in model.named_modules() if isinstance(m, RandLoraLinear)}


def adapt(model, *names, **options):
    """The model, in which these linear layers have become a RandLoraLinear, and nothing else is
    trained."""
    model.requires_grad_(False)
    for name in names:
        model.set_submodule(name, RandLoraLinear(model.get_submodule(name), **options))
    return model


def randomize(model, seed=0):
    """Random diagonals that make adapters and base equally important; exact in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers(model).values():
        for name, basis in layer.bases.items():
            size = (basis.density / basis.K) ** 0.5 / layer.scaling[name]
            for diagonals, factor in ((layer.randlora_lambda, size), (layer.randlora_gamma, 1.0)):
                value = torch.randn(diagonals[name].shape, generator=generator) * factor
                diagonals[name].data.copy_(value.bfloat16())
    return model


def oracle(layer, x):
    """The layer's output by the reference, from leaves (x, lam, gam, ...) that record gradients."""
    base = layer.base_layer
    weight = base.weight.T if layer.fan_in_fan_out else base.weight
    bias = None if base.bias is None else base.bias.double()
    leaves = [x.detach().double().requires_grad_()]
    y = F.linear(leaves[0], weight.double(), bias)
    for name in layer.active_adapters:
        scale = layer.randlora_input_scale[name] if name in layer.randlora_input_scale else None
        A, B = scaled_matrices(layer.bases[name], scale, torch.float64)
        lam = layer.randlora_lambda[name].detach().double().requires_grad_()
        gam = layer.randlora_gamma[name].detach().double().requires_grad_()
        leaves += [lam, gam]
        y = y + linear_reference(leaves[0], None, None, A, B, lam, gam, layer.scaling[name])
    return y, leaves


def run(layer, x, dy):
    """y, dx and the gradients of lambda and gamma of every active adapter."""
    x = x.detach().requires_grad_()
    y = layer(x)
    parameters = []
    for name in layer.active_adapters:
        parameters += [layer.randlora_lambda[name], layer.randlora_gamma[name]]
    return [y, *torch.autograd.grad(y, [x, *parameters], dy)]


def assert_right(layer, x, dy, tolerance):
    """What `run` gives is what the reference gives in float64."""
    y, leaves = oracle(layer, x)
    expected = [y, *torch.autograd.grad(y, leaves, dy.double())]
    for result, wanted in zip(run(layer, x, dy), expected, strict=True):
        assert relative(result, wanted) < tolerance


def inputs(layer, *lead, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, layer.in_features, generator=generator).to(dtype)
    return x, torch.randn(*lead, layer.out_features, generator=generator).to(dtype)


def uneven(*lead, seed=0):
    """Activations of which two features are large."""
    x = torch.randn(*lead, 24, generator=torch.Generator().manual_seed(seed))
    return x * torch.where(torch.arange(24) < 2, 30.0, 1.0)


def input_scale_of(*inputs, own_text=None):
    """By the formula in the docstring of `calibrate`, over the rows of all inputs, of root mean
    square 1. own_text: the inputs in text that the model writes, if it writes some."""
    x = torch.cat([x.detach().flatten(0, -2) for x in inputs]).double()
    energy = x.square().mean(0)
    varying = x.var(0, correction=0) / energy
    if own_text is not None:
        written = own_text.double()
        varying = varying * written.var(0, correction=0) / written.square().mean(0)
    scale = varying**2 / (energy.sqrt() + 0.1 * energy.sqrt().median())
    return normalized(torch.maximum(scale, scale.median() / 1000)).float()


def normalized(scale):
    """Divided by its own root mean square, which is the strength that a whole model shares."""
    return scale / scale.square().mean(-1, keepdim=True).sqrt()


def strengths_of(costs: dict[str, float]) -> dict[str, float]:
    """Likewise, of layers by name: none takes larger steps than those of median cost, and all
    together cost 250."""
    median = statistics.median(costs.values())
    steps = {name: max(cost, median) ** -0.5 for name, cost in costs.items()}
    total = sum(steps[name] ** 2 * costs[name] for name in costs)
    return {name: step * (250 / total) ** 0.5 for name, step in steps.items()}


def small_net(kind=0.1, **options):
    """24 -> 40 -> 24 with adapters of rank 5 in both layers, of a density or "hadamard"."""
    options |= {"basis": kind} if kind == "hadamard" else {"density": kind, "basis": "independent"}
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24))
    for i in (0, 2):
        net[i] = randomize(RandLoraLinear(net[i], r=5, **options), seed=i)
    return net


def pickled(module):
    """(a copy through a file of torch.save, the size of that file)"""
    stream = io.BytesIO()
    torch.save(module, stream)
    size = stream.tell()
    stream.seek(0)
    return torch.load(stream, weights_only=False), size
