"""Small layers on every kind of bases, and a check of what an operator refuses."""

import pytest
import torch
from layer_cases import make_basis, make_layer

from randlora_ext.ops import hadamard, independent

ERRORS = (ValueError, TypeError, RuntimeError)
# in = 8, out = 6, r = 3: d = 6, D = 8, n = 2, K = 6
LISTS, PLANES, HADAMARD, DENSE = BASES = [
    make_basis(8, 6, 3, kind, dtype=torch.float32) for kind in (0.1, 0.5, "hadamard", "dense")
]


def arguments(basis=LISTS):
    layer = make_layer(8, 6, 3, 0.5, 4, torch.float32)
    names = ("x", "weight", "bias", "basis", "lam", "gam")
    return {name: getattr(layer, name) for name in names} | {"basis": basis}


def refuses(function, arguments_, *expected):
    """function raises a message that contains every expected text; no tensor is changed."""
    tensors = [t for t in arguments_.values() if isinstance(t, torch.Tensor)]
    before = [t.clone() for t in tensors if not t.is_meta]
    with pytest.raises(ERRORS) as raised:
        function(**arguments_)
    message = str(raised.value).replace(",)", ")")  # of a shape that Python prints
    for text in expected:
        assert text in message, f"{text!r} is not in: {message}"
    for tensor, copy in zip((t for t in tensors if not t.is_meta), before, strict=True):
        assert torch.equal(tensor, copy)


def packed(basis):
    """The operators' arguments that describe the bases."""
    return (hadamard if basis is HADAMARD else independent).basis_arguments(basis, "cpu")
