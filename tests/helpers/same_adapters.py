"""What two models with the same adapter have in common, on PEFT's layers or on ours."""

import torch

X = torch.randn(6, 24, generator=torch.Generator().manual_seed(3))


def inputs(model):
    return X.to(next(model.parameters()).dtype)


def parameters(model):
    """Lambda, gamma and input scale by their names in PEFT's files."""
    named = (*model.named_parameters(), *model.named_buffers())
    parts = "randlora_lambda", "randlora_gamma", "randlora_input_scale"
    return {
        name.removeprefix("base_model.model."): tensor.detach()
        for name, tensor in named
        if any(part in name for part in parts)
    }


def assert_same(one, other):
    """Bit for bit: outputs, parameters and scalings."""
    first, second = parameters(one), parameters(other)
    assert first.keys() == second.keys() and len(first) > 0
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name])
    scalings = [
        [layer.scaling["default"] for layer in model.modules() if hasattr(layer, "scaling")]
        for model in (one, other)
    ]
    assert scalings[0] == scalings[1]
    with torch.no_grad():
        assert torch.equal(one.eval()(inputs(one)), other.eval()(inputs(other)))
