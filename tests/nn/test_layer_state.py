"""RandLoraLinear: dtypes, copies, state, and what it says to bad input."""

import copy
import subprocess
import sys

import pytest
import torch
from layer_helpers import assert_right, inputs, make_base, pickled, randomize, run, two_adapters
from torch import nn

from randlora_ext import RandLoraLinear

pytestmark = pytest.mark.usefixtures("one_thread")


def test_dtype_moves():
    layer = randomize(RandLoraLinear(make_base(24, 40, dtype=torch.bfloat16), r=5))
    lam = layer.randlora_lambda["default"]
    assert (layer.weight.dtype, lam.dtype) == (torch.bfloat16, torch.float32)
    x, dy = inputs(layer, 9, dtype=torch.bfloat16)
    assert [t.dtype for t in run(layer, x, dy)] == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert_right(layer, x, dy, 0.01)

    layer.to(torch.float16)  # as documented: a cast of the module casts lambda and gamma too
    assert {p.dtype for p in layer.parameters()} == {torch.float16}
    assert {t.dtype for t in run(layer, x.half(), dy.half())} == {torch.float16}
    assert_right(layer, x.half(), dy.half(), 0.01)

    layer.double()
    assert layer.randlora_lambda["default"].dtype == torch.float64
    assert_right(layer, x.double(), dy.double(), 1e-10)
    wrapped_later = RandLoraLinear(layer.base_layer)
    assert wrapped_later.randlora_lambda["default"].dtype == torch.float64
    with pytest.raises(RuntimeError):  # as nn.Linear
        layer(x)


def test_copies_share_the_packed_basis():
    layer = two_adapters(r=8, basis="hadamard", density=None)
    layer.set_adapter(["default", "two"])
    x, _ = inputs(layer, 9, dtype=torch.float64)
    loaded, size = pickled(layer)
    assert size < 30_000
    for other in (copy.deepcopy(layer), loaded):
        assert torch.equal(other(x), layer(x)) and other.weight is not layer.weight
        for name, basis in layer.bases.items():
            assert other.bases[name].packed()[0] is basis.packed()[0]


def test_core_needs_torch_alone():
    apart = {"peft", "transformers", "numpy.f2py"}
    code = f"import sys, randlora_ext; assert not {apart} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", code], check=True)


INDEPENDENT = {"basis": "independent"}
BAD_OPTIONS = [
    ({"alpha": 16}, TypeError, "got an .* argument 'alpha'; did you mean 'randlora_alpha'"),
    *(({"r": r}, ValueError, f"r must be a positive integer, got {r}") for r in (0, -3)),
    ({"r": 2.0}, TypeError, r"r must be .*2\.0"),
    *((INDEPENDENT | {"density": v}, ValueError, rf"density must .* got {v}") for v in (0.0, 1.5)),
    ({"density": 0.3, "basis": "hadamard"}, ValueError, "density must be None for Hadamard bases"),
    ({"basis": "block"}, ValueError, "basis must be one of .*'hadamard'.*, got 'block'"),
    ({"basis": "indep"}, ValueError, "^basis must be .*'indep'; did you mean 'independent'"),
    (INDEPENDENT | {"density": float("nan")}, ValueError, r"density must be .*nan"),
    (INDEPENDENT | {"density": "1"}, TypeError, r"density must be .*'1'"),
    ({"seed": -1}, ValueError, r"seed must be an integer in \[0, 2\*\*64\).*-1"),
    ({"seed": 2**64}, ValueError, r"seed .*18446744073709551616"),
    ({"seed": 0.5}, TypeError, r"seed .*0\.5"),
    ({"randlora_dropout": 1.0}, ValueError, r"randlora_dropout must be in \[0, 1\), got 1\.0"),
    ({"randlora_dropout": "x"}, TypeError, r"randlora_dropout .*'x'"),
    *(
        ({"randlora_alpha": value}, ValueError, "randlora_alpha must be a finite number")
        for value in (float("inf"), float("nan"), 10**400, -(10**400))
    ),
    ({"randlora_alpha": "640"}, TypeError, r"randlora_alpha .*'640'"),
    *(({"adapter_name": n}, ValueError, f"adapter_name .*'{n}'") for n in ("", "a.b", "keys")),
    ({"adapter_name": 3}, TypeError, r"adapter_name .*3"),
]


@pytest.mark.parametrize("options,error,message", BAD_OPTIONS, ids=lambda v: str(v)[:40])
def test_bad_options_change_nothing(options, error, message):
    base = nn.Linear(8, 8)
    with pytest.raises(error, match=message):
        RandLoraLinear(base, **options)
    assert base.weight.requires_grad
    layer = RandLoraLinear(base, r=2)
    keys = set(layer.state_dict())
    with pytest.raises(error, match=message):
        layer.update_layer(**{"adapter_name": "other", **options})
    assert set(layer.state_dict()) == keys and list(layer.bases) == ["default"]


def test_bad_inputs_and_names():
    layer = RandLoraLinear(nn.Linear(8, 6), r=2)
    with pytest.raises(RuntimeError, match="dtype"):  # as nn.Linear
        layer(torch.zeros(3, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"in_features = 8, got \(3, 7\)"):
        layer(torch.zeros(3, 7))
    with pytest.raises(ValueError, match=r"in_features = 8, got \(\)"):
        layer(torch.zeros(()))
    for call in (layer.set_adapter, layer.get_delta_weight, layer.get_scaled_bases):
        with pytest.raises(ValueError, match=r"unknown adapter 'x'; known are \['default'\]"):
            call("x")
    with pytest.raises(ValueError, match="must not repeat"):
        layer.set_adapter(["default", "default"])
    assert layer.active_adapters == ["default"]
    for module in (nn.Conv1d(4, 4, 1), nn.Embedding(3, 3), nn.LazyLinear(4), None):
        with pytest.raises(TypeError, match="base_layer must be an nn.Linear or a transformers"):
            RandLoraLinear(module)


def test_text_in_a_state_dict_is_refused_by_name():
    layer = RandLoraLinear(nn.Linear(4, 4), r=2)
    for key in layer.state_dict():
        with pytest.raises(RuntimeError, match=f"{key} must be a tensor, got str"):
            layer.load_state_dict({**layer.state_dict(), key: "text"})
