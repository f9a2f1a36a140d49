"""Adapters of fused experts under PEFT."""

import torch
import torch.nn.functional as F
from expert_models import EXPERTS, make
from layer_cases import delta_by_reference
from peft_helpers import adapted, randomize


def moe(name="Mixtral", seed=0, **options):
    default = {"basis": "hadamard", "target_parameters": EXPERTS, "targets": []}
    options = default | options
    return adapted(make(name), r=4, seed=seed, **options)


def experts_of(model):
    """The module around the experts of the last block."""
    block = model.base_model.model.model.layers[-1]
    return (block.mlp if hasattr(block, "mlp") else block.feed_forward).experts


def parameters_of(model):
    """The layers of the last block's experts by the names of their parameters."""
    return dict(experts_of(model).adapted_parameters.named_children())


def oracle(layer):
    """dW of each expert by the reference, as the parameter is stored."""
    basis, scaling = layer.basis_of("default", torch.device("cpu")), layer.scaling["default"]
    parts = layer.randlora_lambda, layer.randlora_gamma, layer.randlora_input_scale
    each = zip(*(part["default"].double() for part in parts), strict=True)
    dW = [delta_by_reference(basis, lam, gam, scaling, scale) for lam, gam, scale in each]
    return torch.stack([d.T if layer.transposed else d for d in dW])


class Mixture(torch.nn.Module):
    """Experts that multiply in the given way, over a linear layer of their own."""

    def __init__(self, multiply):
        super().__init__()
        self.multiply, self.up = multiply, torch.nn.Parameter(torch.randn(3, 24, 24))
        self.linear = torch.nn.Linear(24, 24)

    def forward(self, x):
        return self.multiply(self.linear(x), self.up)


def mixture(multiply):
    """Adapted: the parameter by "0.up" and the linear layer; its update is zero."""
    torch.manual_seed(0)
    chosen = {"basis": "hadamard", "target_parameters": ["0.up"]}
    model = torch.nn.Sequential(Mixture(multiply))
    return randomize(adapted(model, ["linear"], 4, **chosen), size=0)


# Ways in which a mixture multiplies its tokens by its experts.
WAYS = {
    "matmul": lambda h, up: h @ up.mT,
    "four dimensions": lambda h, up: h[None, :, None].transpose(1, 2) @ up.mT,
    "vectors": lambda h, up: [[F.linear(row, w) for row in h] for w in up],
    "vectors and the stack": lambda h, up: [torch.matmul(row, up.mT) for row in h],
    "keywords": lambda h, up: [F.linear(input=h, weight=w) for w in up],
    "halves": lambda h, up: [
        h @ up[e, rows].T for e in range(3) for rows in (slice(0, 12), slice(12, 24))
    ],
    "padded": lambda h, up: torch.bmm(F.pad(h, (0, 0, 0, 9)).expand(3, -1, -1), up.mT),
}
