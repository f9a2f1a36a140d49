"""randlora_ext.peft over base layers that bitsandbytes or torchao has quantized."""

import contextlib
import copy

import pytest
import torch
from peft_helpers import (
    adapted,
    assert_close,
    config,
    deltas,
    layers,
    pair,
    randomize,
    relative,
    run,
)
from quantized_nets import by_bitsandbytes as quantized
from torch import nn

import randlora_ext
from randlora_ext.peft.quantized import QuantizedLinear

pytestmark = pytest.mark.filterwarnings("ignore")  # of these packages


@pytest.fixture(params=[8, 4])
def bits(request):
    return request.param


def quantized_pair(bits, sparse=True, **options):
    return pair(quantized(bits), lambda: config(8, sparse=sparse, **options))


def made(bits, dtype=torch.float32, r=8, sparse=True, **options):
    return adapted(quantized(bits, dtype), "abc", r, sparse=sparse, **options).eval()


def dense(layer):
    from peft.utils.integrations import dequantize_module_weight

    layer.get_base_layer().state_dict()  # undoes the order of inference on the CPU
    return dequantize_module_weight(layer.get_base_layer()).detach().float().clone()


def rounded(layer, weight):
    """The same as a quantized layer of that weight holds it."""
    other = copy.deepcopy(layer.get_base_layer())
    bnb = pytest.importorskip("bitsandbytes")
    if isinstance(other, bnb.nn.Linear8bitLt):
        other.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        other.weight = other.weight.to("cpu")
        return other.weight.data.float() * (other.weight.SCB / 127)[:, None]
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return bnb.functional.dequantize_4bit(packed, state)


@pytest.fixture
def calibrated(bits):
    """In training mode, with the dense weights from before."""
    model = adapted(quantized(bits), "abc", 8, basis="hadamard").train()
    for layer in layers(model):
        nn.init.zeros_(layer.randlora_lambda["default"])
    before = [dense(layer) for layer in layers(model)]
    randlora_ext.calibrate(model, [torch.randn(40, 64)])
    return model, before


def test_calibration_reaches_every_layer_and_keeps_the_mode(calibrated):
    model, _ = calibrated
    assert all(module.training for module in model.modules())
    assert all(layer.is_calibrated("default") for layer in layers(model))


def test_training_after_calibration(calibrated):
    """In eval mode on a CPU 4 bits are brought into an order in which they cannot train."""
    model, _ = calibrated
    model(torch.randn(5, 64)).sum().backward()
    assert all(layer.randlora_lambda["default"].grad.any() for layer in layers(model))


def test_calibration_leaves_the_quantized_weights(calibrated):
    model, before = calibrated
    assert all(map(torch.equal, map(dense, layers(model)), before))


@pytest.mark.parametrize(
    "bits,options",
    [(8, {}), (4, {}), (4, {"sparse": False}), (8, {"randlora_dropout": 0.3})],
    ids=str,
)
def test_forward_and_gradients_are_those_of_stock(bits, options):
    stock, ours = quantized_pair(bits, **options)
    assert {type(layer) for layer in layers(ours)} == {QuantizedLinear}
    x, dy = torch.randn(5, 64), torch.randn(5, 64)
    assert_close(run(ours, x, dy), run(stock, x, dy), 1e-5)


def test_dtype_is_that_of_the_input(bits):
    """Stock PEFT answers float32 to a bfloat16 input where it upcast the adapter."""
    model, x = made(bits, torch.bfloat16), torch.randn(5, 64)
    assert model(x.bfloat16()).dtype == torch.bfloat16
    assert relative(model(x.bfloat16()), model(x)) < 0.05


# ---- merging -------------------------------------------------------------------------------------


def stored(layer):
    """Every byte of a quantized base layer."""
    state = layer.get_base_layer().state_dict()
    return {k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)}


def unmerge_a_copy(model):
    copy.deepcopy(model).unmerge_adapter()
    model.unmerge_adapter()


UNMERGE = {
    "moved": lambda model: model.to("cpu").unmerge_adapter(),
    "beside a copy": unmerge_a_copy,
}


@pytest.mark.parametrize("unmerge", UNMERGE.values(), ids=UNMERGE)
@pytest.mark.parametrize("bits,called", [(8, True), (4, True), (4, False)])
def test_unmerging_puts_the_quantized_weight_back(bits, called, unmerge):
    """bitsandbytes keeps scales elsewhere after the first call, and reorders 4-bit weights."""
    ours, x = made(bits), torch.randn(5, 64)
    want = copy.deepcopy(ours)(x)
    if called:
        ours(x)
    before = [stored(layer) for layer in layers(ours)]
    for cycle in range(2):
        ours.merge_adapter()
        randomize(ours, seed=cycle)
        unmerge(ours)
        for layer, was in zip(layers(ours), before, strict=True):
            now = stored(layer)
            assert was.keys() == now.keys() and not layer._kept
            assert all(torch.equal(was[key], now[key]) for key in was)
    randomize(ours)
    assert torch.equal(ours(x), want)


ROUNDING = {8: 0.03, 4: 0.3}


class Merged:
    """A merged model, and what it was before."""

    def __init__(self, bits, safe):
        self.model, self.x = made(bits), torch.randn(5, 64)
        self.before = self.model(self.x)
        self.bare = copy.deepcopy(self.model).unload()(self.x)
        self.weights = [dense(layer) for layer in layers(self.model)]
        self.changes = [delta.detach() for delta in deltas(self.model)]
        self.model.merge_adapter(safe_merge=safe)

    def of_layers(self):
        return zip(layers(self.model), self.weights, self.changes, strict=True)


@pytest.fixture(params=[(8, True), (4, False)], ids=str)
def merged(request):
    return Merged(*request.param)


def test_merging_is_dequantized_weight_plus_delta(merged):
    """Stock PEFT multiplies A' B: an error for the oblong layers, wrong for the square one."""
    for layer, weight, delta in merged.of_layers():
        assert layer.merged and relative(dense(layer), rounded(layer, weight + delta)) < 1e-6


def test_a_merged_model_computes_what_the_adapter_did_but_for_rounding(merged):
    bits = 8 if hasattr(merged.model.base_model.model, "is_loaded_in_8bit") else 4
    after = merged.model(merged.x)
    assert relative(after, merged.before) < ROUNDING[bits] < relative(merged.bare, merged.before)


@pytest.mark.parametrize("bits,safe", [(8, True), (4, False)])
def test_merge_and_unload_gives_quantized_layers(bits, safe):
    model, x = made(bits), torch.randn(5, 64)
    before = model(x)
    merged = model.merge_and_unload(safe_merge=safe)
    assert type(merged.a).__module__.startswith("bitsandbytes")
    assert relative(merged(x), before) < ROUNDING[bits]


def test_a_safe_merge_refuses_nan_and_changes_nothing(bits):
    ours = made(bits)
    layer = layers(ours)[0]
    with torch.no_grad():
        layer.randlora_lambda["default"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        ours.merge_adapter(safe_merge=True)
    assert not layer.merged and dense(layer).isfinite().all()


# ---- beside other adapters, and files ------------------------------------------------------------


@pytest.fixture
def two(bits):
    ours = made(bits)
    ours.add_adapter("two", config(5, sparse=True, randlora_dropout=0.1))
    return randomize(ours).eval()


def test_an_added_adapter_stands_beside_the_first(two):
    """Stock PEFT wraps the wrapped layer again, and adds the first adapter to the second."""
    assert not any(hasattr(layer.base_layer, "base_layer") for layer in layers(two))
    assert list(layers(two)[0].randlora_lambda) == ["default", "two"]


def test_each_row_of_a_batch_has_its_adapter(two):
    x, names, rows = torch.randn(3, 64), ["default", "two", "default"], []
    for name, row in zip(names, x, strict=True):
        two.set_adapter(name)
        rows.append(two(row[None]))
    mixed = two(x, adapter_names=names)
    assert relative(mixed, torch.cat(rows)) < 0.02  # 8-bit activations are rounded row by row


def test_pickle(tmp_path, bits):
    ours, x = made(bits), torch.randn(5, 64)
    torch.save(ours, tmp_path / "model.pt")
    assert relative(torch.load(tmp_path / "model.pt", weights_only=False)(x), ours(x)) < 1e-6


# ---- torchao -------------------------------------------------------------------------------------


@pytest.fixture
def of_torchao():
    """(on stock PEFT, ours) PEFT has no torchao layer for RandLoRA: its Linear stands over it."""
    torchao = pytest.importorskip("torchao.quantization")
    base = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    torchao.quantize_(base, torchao.Int8WeightOnlyConfig())
    return pair(base, lambda: config(8, targets="02", sparse=True))


def test_torchao_forward_and_gradients_are_those_of_stock(of_torchao):
    stock, ours = of_torchao
    x, dy = torch.randn(5, 64), torch.randn(5, 64)
    assert_close(run(ours, x, dy), run(stock, x, dy), 1e-5)


def test_torchao_merging_keeps_the_outputs(of_torchao):
    _, ours = of_torchao
    y = ours(x := torch.randn(5, 64))
    with contextlib.suppress(NotImplementedError):  # of torchao 0.18, under stock PEFT too
        ours.merge_adapter()
    assert relative(ours(x), y) < 0.1
