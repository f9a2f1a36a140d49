"""RandLoraLinear against plain PyTorch on dense bases: numbers, dtypes, state and errors."""

import copy

import pytest
import torch
from layer_cases import run_python
from layer_helpers import assert_right, inputs, make_base, oracle, randomize, relative, two_adapters
from torch import nn
from torch.nn import functional as F

from randlora_ext import RandLoraLinear


@pytest.mark.parametrize("basis", ["independent", "hadamard"])
@pytest.mark.parametrize("kind", ["linear", "no bias", "subclass", "hook", "replaced", "conv1d"])
def test_every_kind_of_base(kind, basis):
    base = make_base(24, 40, kind, bias=kind != "no bias", dtype=torch.float64)
    calls = []
    layer = RandLoraLinear(base, r=7, basis=basis)
    x, dy = inputs(layer, 11, dtype=torch.float64)
    # A fresh adapter changes nothing.
    torch.testing.assert_close(layer(x), base(x), rtol=0, atol=0)
    assert not layer.get_delta_weight("default").any()
    if kind == "hook":
        base.register_forward_hook(lambda *_: calls.append(1))
    elif kind == "replaced":  # as accelerate's offloading does
        base.forward = lambda x, forward=base.forward: calls.append(1) or forward(x)
    assert_right(randomize(layer), x, dy, 1e-10)
    assert len(calls) == (kind in ("hook", "replaced"))
    delta = layer.get_delta_weight("default")
    weight = (base.weight + delta).T if kind == "conv1d" else base.weight + delta
    assert delta.requires_grad and relative(layer(x), F.linear(x, weight, base.bias)) < 1e-10


def test_initial_values_and_attributes():
    layer = RandLoraLinear(nn.Linear(24, 40), r=5, adapter_name="mine")
    assert layer.active_adapters == ["mine"]
    assert layer.r == {"mine": 5}
    assert layer.scaling == {"mine": 20.0}  # whatever r
    layer.update_layer("other", r=8, randlora_alpha=100)
    assert layer.scaling.pop("other") == 12.5
    assert not layer.randlora_lambda["mine"].any()
    assert torch.equal(layer.randlora_gamma["mine"], torch.full((5, 24), 1 / 24))
    assert (layer.weight, layer.bias) == (layer.base_layer.weight, layer.base_layer.bias)
    trained = {n for n, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"randlora_lambda.mine", "randlora_gamma.mine"}


def test_dropout():
    layer = randomize(RandLoraLinear(make_base(24, 40), r=5, randlora_dropout=0.5))
    x = torch.randn(64, 24)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    wanted = layer.base_layer(x) + oracle(layer, dropped)[0] - layer.base_layer(dropped)
    assert relative(y, wanted) < 1e-5
    layer.eval()
    assert relative(layer(x), oracle(layer, x)[0]) < 1e-5
    assert not RandLoraLinear(nn.Linear(4, 4).eval(), randlora_dropout=0.5).training


# ---- merging into the base weight, and out of it again -----------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_merge_rounds_once_and_without_a_kept_weight_unmerge_nearly_restores(kind, dtype):
    base = make_base(24, 40, kind, dtype=dtype)
    layer = RandLoraLinear(base, r=5, basis="independent")
    layer.update_layer("two", r=8)
    randomize(layer).set_adapter(["default", "two"])
    assert layer.randlora_lambda["two"].dtype == torch.promote_types(dtype, torch.float32)
    x, _ = inputs(layer, 9, dtype=dtype)
    before, adapted = base.weight.detach().clone(), oracle(layer, x)[0]
    total = before.to(torch.float32 if dtype.itemsize == 2 else torch.float64)
    for name in ("default", "two"):
        total = total + layer.get_delta_weight(name).detach()
    layer.merge(safe_merge=True, keep_weight="nothing")
    assert layer.merged_adapters == ["default", "two"] and layer._kept is None
    assert torch.equal(base.weight, total.to(dtype))
    assert torch.equal(layer(x), base(x))
    assert relative(layer(x), adapted) < 4 * torch.finfo(dtype).eps
    layer.unmerge()
    assert not layer.merged
    largest = torch.maximum(before.abs(), total.abs().to(dtype))
    if dtype == torch.float64:  # no wider dtype to add two adapters in
        largest = largest.max()
    assert bool(((base.weight - before).abs() <= torch.finfo(dtype).eps * largest).all())
    assert relative(layer(x), adapted) < 4 * torch.finfo(dtype).eps


def test_merging_errors_change_nothing():
    layer = two_adapters(torch.float32)
    layer.merge(adapter_names=["default"])
    layer.randlora_lambda["two"].data[0, 0] = torch.nan
    before = copy.deepcopy(layer.state_dict())
    for names, keep_weight, message in (
        (None, "host", "'default' is merged already"),
        (["two", "default"], "host", "'default' is merged already"),
        (["two", "x"], "host", r"adapter_names must be one of .*default.*two.*got 'x'"),
        (["two", "two"], "host", "must not repeat"),
        (["two"], "disk", "keep_weight must be one of .*'host'.*got 'disk'"),
        (["two"], "host", r"NaNs detected.* two seems"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.merge(True, names, keep_weight)
        assert layer.merged_adapters == ["default"]
        for key, value in layer.state_dict().items():
            torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match="'default' is merged"):
        layer.update_layer("default")
    layer.unmerge()
    with pytest.warns(UserWarning, match="Nothing to do"):
        layer.unmerge()
    layer.disable()
    with pytest.raises(RuntimeError, match="disabled"):
        layer.merge()


# ---- what the layer says to bad input ------------------------------------------------------------


def test_core_needs_torch_alone():
    apart = {"peft", "transformers", "numpy.f2py"}
    run_python("-c", f"import sys, randlora_ext; assert not {apart} & {{*sys.modules}}")


BAD_OPTIONS = [
    ({"alpha": 16}, TypeError, "got an .* argument 'alpha'"),
    ({"r": 0}, ValueError, "r must be an integer in \\[1, 65536\\], got 0"),
    ({"density": 0.3, "basis": "hadamard"}, ValueError, "density must be None for Hadamard bases"),
    ({"basis": "indep"}, ValueError, "^basis must be .*'indep'; did you mean 'independent'"),
    ({"randlora_dropout": 1.0}, ValueError, r"randlora_dropout must .* in \[0, 1\), got 1\.0"),
    ({"randlora_dropout": "x"}, TypeError, r"randlora_dropout .*'x'"),
    *(
        ({"randlora_alpha": value}, ValueError, "randlora_alpha must be a finite number")
        for value in (float("inf"), float("nan"), -(10**400))
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


def test_bad_inputs_names_and_states():
    layer = RandLoraLinear(nn.Linear(8, 6), r=2)
    with pytest.raises(RuntimeError, match="dtype"):  # as nn.Linear
        layer(torch.zeros(3, 8, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=r"in_features = 8, got \(3, 7\)"):
        layer(torch.zeros(3, 7))
    for call in (layer.set_adapter, layer.get_delta_weight):
        with pytest.raises(ValueError, match=r"adapter.* must be one of \['default'\], got 'x'"):
            call("x")
    with pytest.raises(ValueError, match="must not repeat"):
        layer.set_adapter(["default", "default"])
    assert layer.active_adapters == ["default"]
    for module in (nn.Conv1d(4, 4, 1), nn.LazyLinear(4), None):
        with pytest.raises(TypeError, match="base_layer must be an nn.Linear or a transformers"):
            RandLoraLinear(module)
    for key in layer.state_dict():
        with pytest.raises(RuntimeError, match=f"{key} must be a tensor, got str"):
            layer.load_state_dict({**layer.state_dict(), key: "text"})
