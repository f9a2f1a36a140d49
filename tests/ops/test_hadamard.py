"""Hadamard bases: what only they have. Files beside this one try them with the other kinds.

The operators' own checks, and plain torch for devices without kernels.
"""

import pytest
import torch
from layer_cases import Layer, by_plain_torch, make_layer, operands, ours

from randlora_ext import _C, Basis, devices
from randlora_ext.ops import functional
from randlora_ext.ops import hadamard as module

ops = torch.ops.randlora
# test_errors.py has what `linear` can be given.
OPERATORS = ("hadamard_linear", "hadamard_linear_backward", "hadamard_weight")


# in = 8, out = 6, r = 3: d = 6, D = 8, n = 2, K = 6
@pytest.mark.parametrize(
    "change, expected, by_both",
    [
        ({"lam": torch.ones(6)}, ["lam"], True),
        ({"lam": torch.ones(4, 2)}, ["col", "8"], True),
        ({"gam": torch.ones(2, 1)}, ["gam", "(2, 1)"], True),
        ({"col": torch.ones(7)}, ["col", "6", "7"], True),
        ({"s": torch.ones(6).char()}, ["s", "float32", "int8"], True),
        ({"weight": torch.ones(1, 8)}, ["weight", "(6, 8)", "(1, 8)"], True),
        # What plain torch finds itself, or need not know.
        ({"s": torch.ones(5)}, ["s", "d = 6", "(5)"], False),
        ({"s": torch.ones(12)[::2]}, ["s", "contiguous"], False),
        ({"s": torch.ones(6).to("meta")}, ["s", "meta", "cpu"], False),
        ({"row": torch.ones(0)}, ["row"], False),
        ({"row": torch.ones(2, 4)}, ["row", "(2, 4)"], False),
        ({"weight": torch.ones(6, 8).int()}, ["weight", "int32"], False),
    ],
)
def test_one_wrong_argument(change, expected, by_both):
    layer = make_layer(8, 6, 3, "hadamard", 4, torch.float32)
    bases = dict(zip(("s", "row", "col", "expand", "scale"), operands(layer), strict=True))
    values = vars(layer) | bases | {"need_x": True, "need_diagonals": True} | change
    for name in OPERATORS:
        op = getattr(ops, name)
        inputs = [values[argument.name] for argument in op.default._schema.arguments]
        by_torch = getattr(module, name.replace("hadamard", "_plain"))
        for function in (op, by_torch)[: 1 + by_both]:
            with pytest.raises(RuntimeError, match="randlora: ") as raised:
                function(*inputs)
            message = str(raised.value).splitlines()[0]
            told = expected if function is op else expected[:2]
            assert all(text in message for text in told), (function, message)


def test_plain_torch_computes_what_a_card_cannot_hold(monkeypatch):
    # On the CUDA kernels compiled for the CPU (docs/cuda-on-cpu.md) this asks them: of these sizes
    # N is 65536.
    basis = Basis(33024, 33024, 256, kind="hadamard")
    if devices.cuda_serves("cpu"):
        assert functional.what_computes(basis, torch.device("cpu"), torch.float32) == "plain torch"
        x, lam = torch.randn(2, 33024), torch.randn(256, 129)
        gam = torch.zeros(129, 33024).index_fill(1, torch.arange(0, 33024, 511), 1 / 33024)
        layer = Layer(basis, x, None, None, lam, gam, torch.randn(2, 33024))
        for name, value in ours(layer).items():
            assert torch.equal(value, by_plain_torch(layer)[name]), name
    monkeypatch.setattr(functional, "cuda_serves", lambda device_type: True)
    for fits, told in ((False, "plain torch"), (True, f"{_C.isa()} kernels")):
        monkeypatch.setattr(_C, "hadamard_fits", lambda *sizes, fits=fits: fits)
        assert functional.what_computes(basis, torch.device("cpu"), torch.float32) == told


@pytest.mark.parametrize("name", OPERATORS)
def test_plain_torch_is_registered_for_every_other_device(name):
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has(f"randlora::{name}", "CompositeExplicitAutograd") and has(f"randlora::{name}", "CPU")
    table = torch._C._dispatch_dump_table(f"randlora::{name}").splitlines()
    for key in ("XPU", "MPS", "PrivateUse1"):
        (line,) = [line for line in table if line.startswith(f"{key}:")]
        assert "default backend kernel" in line, line


def test_the_weight_has_a_gradient():
    layer = make_layer(9, 5, 2, "hadamard", 3)
    W = layer.weight.clone().requires_grad_()
    ops.hadamard_weight(W, layer.lam, layer.gam, *operands(layer)).sum().backward()
    assert torch.equal(W.grad, torch.ones_like(W))
