"""randlora_ext.peft over quantized base layers: bitsandbytes, torchao, and HQQ, GPTQ and AWQ.

The last three, which stock RandLoRA refuses, are skipped without hqq, gptqmodel and optimum;
`Rounded` stands in for them.
"""

import contextlib
import copy

import pytest
import torch
from layer_helpers import interrupts
from peft.utils import quantization_utils
from peft.utils.quantization_utils import HqqBackend
from peft_helpers import (
    accelerated,
    adapted,
    assert_close,
    config,
    deltas,
    layers,
    opened,
    pair,
    peft,
    randomize,
    relative,
    run,
    stock_made,
)
from torch import nn

import randlora_ext
from randlora_ext.peft.layer import AcceleratedLinear
from randlora_ext.peft.quantized import QuantizedLinear

pytestmark = pytest.mark.filterwarnings("ignore")  # of these packages

SIZES = {"a": (64, 128), "b": (128, 64), "c": (64, 64)}
GROUP = 32


class Net(nn.Module):
    def __init__(self, quantize):
        super().__init__()
        torch.manual_seed(0)
        for name, sizes in SIZES.items():
            setattr(self, name, quantize(nn.Linear(*sizes).requires_grad_(False)))

    def forward(self, x):
        return self.c(self.b(torch.tanh(self.a(x))))


@pytest.fixture(params=[8, 4])
def bits(request):
    return request.param


def quantized(bits, dtype=torch.float32):
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


@pytest.mark.parametrize("bits", [4, 8])
def test_training_after_calibration(bits):
    """In eval mode on a CPU 4 bits are brought into an order in which they cannot train."""
    model = adapted(quantized(bits), "abc", 8, basis="hadamard").train()
    for layer in layers(model):
        nn.init.zeros_(layer.randlora_lambda["default"])
    before = [dense(layer) for layer in layers(model)]
    randlora_ext.calibrate(model, [torch.randn(40, 64)])
    assert all(module.training for module in model.modules())
    model(torch.randn(5, 64)).sum().backward()
    assert all(layer.is_calibrated("default") for layer in layers(model))
    assert all(layer.randlora_lambda["default"].grad.any() for layer in layers(model))
    assert all(map(torch.equal, map(dense, layers(model)), before))


@pytest.mark.parametrize(
    "bits,kind",
    [(8, {}), (4, {}), (4, {"sparse": False}), (8, {"randlora_dropout": 0.3})],
    ids=str,
)
def test_forward_and_gradients_are_those_of_stock(bits, kind):
    stock, ours = quantized_pair(bits, **kind)
    assert {type(layer) for layer in layers(ours)} == {QuantizedLinear}
    x, dy = torch.randn(5, 64), torch.randn(5, 64)
    assert_close(run(ours, x, dy), run(stock, x, dy), 1e-5)


def test_dtype_is_that_of_the_input(bits):
    """Stock PEFT answers float32 to a bfloat16 input where it upcast the adapter."""
    model, x = made(bits, torch.bfloat16), torch.randn(5, 64)
    assert model(x.bfloat16()).dtype == torch.bfloat16
    assert relative(model(x.bfloat16()), model(x)) < 0.05


def stored(layer):
    """Every byte of a quantized base layer."""
    state = layer.get_base_layer().state_dict()
    return {k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)}


@pytest.mark.parametrize("bits,called", [(8, True), (4, True), (4, False)])
def test_unmerging_puts_the_quantized_weight_back(bits, called):
    """bitsandbytes keeps scales elsewhere after the first call, and reorders 4-bit weights."""
    ours, x = made(bits), torch.randn(5, 64)
    want = copy.deepcopy(ours)(x)
    bare = copy.deepcopy(ours).unload()(x)
    if called:
        ours(x)
    before = [stored(layer) for layer in layers(ours)]
    for cycle in range(3):
        ours.merge_adapter()
        assert relative(ours(x), bare) > 0.1
        randomize(ours, seed=cycle)
        (copy.deepcopy(ours) if cycle else ours.to("cpu")).unmerge_adapter()
        if cycle:
            ours.unmerge_adapter()
        for layer, was in zip(layers(ours), before, strict=True):
            now = stored(layer)
            assert was.keys() == now.keys() and layer._kept is None
            assert all(torch.equal(was[key], now[key]) for key in was)
    randomize(ours)
    assert torch.equal(ours(x), want)


@pytest.mark.parametrize("bits,safe", [(8, True), (4, False)])
def test_merging_is_dequantized_weight_plus_delta(bits, safe, monkeypatch):
    """Stock PEFT multiplies A' B: an error for the oblong layers, wrong for the square one."""
    ours = made(bits)
    monkeypatch.setattr(AcceleratedLinear, "keep_weight", "nothing")
    x = torch.randn(5, 64)
    before, bare = ours(x), copy.deepcopy(ours).unload()(x)
    weights = [dense(layer) for layer in layers(ours)]
    changes = [delta.detach() for delta in deltas(ours)]
    ours.merge_adapter(safe_merge=safe)
    sums = []
    for layer, weight, delta in zip(layers(ours), weights, changes, strict=True):
        sums.append(dense(layer))
        assert layer.merged and relative(sums[-1], rounded(layer, weight + delta)) < 1e-6
    rounding = {8: 0.03, 4: 0.3}[bits]
    assert relative(ours(x), before) < rounding < relative(bare, before)
    ours.unmerge_adapter()
    for layer, total, delta in zip(layers(ours), sums, changes, strict=True):
        assert not layer.merged
        # Inference on the CPU has rounded the block scales of 4-bit weights to bfloat16.
        assert relative(dense(layer), rounded(layer, total - delta)) < {8: 1e-6, 4: 0.05}[bits]
    merged = ours.merge_and_unload(safe_merge=safe)
    assert type(merged.a).__module__.startswith("bitsandbytes")
    assert relative(merged(x), before) < 1.5 * rounding


def test_weight_and_state_agree_after_nan_and_ctrl_c(bits):
    ours = made(bits)
    layer = layers(ours)[0]
    with torch.no_grad():
        layer.randlora_lambda["default"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        ours.merge_adapter(safe_merge=True)
    assert not layer.merged and dense(layer).isfinite().all()
    randomize(ours)
    before, delta = dense(layer), layer.get_delta_weight("default").detach()
    start = copy.deepcopy(layer.base_layer)
    states = {False: before, True: rounded(layer, before + delta)}
    for at in interrupts(layer.merge, watched="randlora_ext/peft"):
        assert relative(dense(layer), states[layer.merged]) < 1e-6, at
        layer.base_layer, layer.merged_adapters = copy.deepcopy(start), []


def test_an_added_adapter_stands_beside_the_first(bits):
    """Stock PEFT wraps the wrapped layer again, and adds the first adapter to the second."""
    ours, x = made(bits), torch.randn(3, 64)
    ours.add_adapter("two", config(5, sparse=True, randlora_dropout=0.1))
    assert not any(hasattr(layer.base_layer, "base_layer") for layer in layers(ours))
    assert list(layers(ours)[0].randlora_lambda) == ["default", "two"]
    randomize(ours).eval()
    names, rows = ["default", "two", "default"], []
    for name, row in zip(names, x, strict=True):
        ours.set_adapter(name)
        rows.append(ours(row[None]))
    mixed = ours(x, adapter_names=names)
    assert relative(mixed, torch.cat(rows)) < 0.02  # 8-bit activations are rounded row by row


def test_pickle_and_accelerate(tmp_path, bits):
    stock, ours = quantized_pair(bits)
    x = torch.randn(5, 64)
    torch.save(ours, tmp_path / "model.pt")
    assert relative(torch.load(tmp_path / "model.pt", weights_only=False)(x), ours(x)) < 1e-6
    wanted = stock(x)
    accelerated.accelerate(stock)
    assert type(layers(stock)[0]) is QuantizedLinear
    assert relative(stock(x), wanted) < 1e-5


def test_what_stock_merged_must_be_unmerged_by_stock(bits):
    """It has added A' B to a square weight; ours would take B A' away."""
    model = stock_made(base=lambda: quantized(bits), r=8, targets="c", sparse=True)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged by stock PEFT.*call unmerge_adapter\(\) first"):
        accelerated.accelerate(model)
    assert type(model.base_model.model.c).__module__.startswith("peft.")  # nothing is changed
    assert type(model.base_model) is peft.tuners.randlora.RandLoraModel


def test_torchao():
    """PEFT has no torchao layer for RandLoRA: its Linear stands over the quantized weight."""
    torchao = pytest.importorskip("torchao.quantization")
    base = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    torchao.quantize_(base, torchao.Int8WeightOnlyConfig())
    stock, ours = pair(base, lambda: config(8, targets="02", sparse=True))
    x, dy = torch.randn(5, 64), torch.randn(5, 64)
    assert_close(run(ours, x, dy), run(stock, x, dy), 1e-5)
    y = ours(x)
    with contextlib.suppress(NotImplementedError):  # of torchao 0.18, under stock PEFT too
        ours.merge_adapter()
    assert relative(ours(x), y) < 0.1


# ---- bases that are not nn.Linear ----------------------------------------------------------------


def hqq(linear):
    module = pytest.importorskip("hqq.core.quantize")
    chosen = module.BaseQuantizeConfig(nbits=4, group_size=64)
    options = {"compute_dtype": torch.float32, "device": "cpu", "del_orig": False}
    return module.HQQLinear(linear, chosen, **options)


def gptqmodel(linear, kind, sym):
    """Rounds to 4 bits, by groups of inputs and without data."""
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    if kind == "gptq":
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear as Layer
    else:
        from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear as Layer

    out_features, in_features = linear.weight.shape
    groups = linear.weight.detach().view(out_features, -1, GROUP)
    scales, zeros = groups.abs().amax(-1) / 7, torch.full(groups.shape[:2], 8.0)
    options = {"bits": 4, "group_size": GROUP, "sym": sym, "desc_act": False, "bias": True}
    sizes = {"in_features": in_features, "out_features": out_features}
    layer = Layer(**options, **sizes, register_buffers=True)
    of_groups = (torch.arange(in_features) // GROUP).int()
    with torch.no_grad():
        layer.pack(linear, scales, zeros, of_groups)
    layer.post_init()
    return layer.eval()


class Rounded(nn.Module):
    """Like those of HQQ: no nn.Linear, and another layer holds another weight."""

    def __init__(self, linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("codes", (linear.weight.detach() / self.scale).round().char())
        self.bias = linear.bias

    def dequantize(self):
        return self.codes * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.dequantize(), self.bias)


class RoundedBackend(HqqBackend):
    def set_base_weight(self, peft_layer, weight_data):
        linear = nn.Linear(peft_layer.in_features, peft_layer.out_features, bias=False)
        linear.weight = nn.Parameter(weight_data, False)
        peft_layer.base_layer = Rounded(linear)


@pytest.fixture(autouse=True)
def rounded_is_known(monkeypatch):
    def resolve(base, **kwargs):
        return RoundedBackend() if isinstance(base, Rounded) else known(base, **kwargs)

    known = quantization_utils.resolve_quantization_backend
    for place in ("peft.utils.quantization_utils", "randlora_ext.peft.quantized"):
        monkeypatch.setattr(f"{place}.resolve_quantization_backend", resolve)


BASES = {
    "rounded": Rounded,
    "hqq": hqq,
    "gptq": lambda linear: gptqmodel(linear, "gptq", True),
    "awq": lambda linear: gptqmodel(linear, "awq", False),
}


def dense_copy(net):
    """nn.Linear with the weights that the quantized layers multiply by."""
    plain = Net(lambda linear: linear)
    with torch.no_grad():
        for name, (n_in, _) in SIZES.items():
            layer = getattr(net, name)
            bias = layer(torch.zeros(1, n_in)).float()
            getattr(plain, name).weight.copy_((layer(torch.eye(n_in)).float() - bias).T)
            getattr(plain, name).bias.copy_(bias[0])
    return plain


@pytest.fixture(params=BASES)
def net(request):
    return Net(BASES[request.param])


@pytest.mark.parametrize("kind", [{"sparse": True}, {}, {"basis": "hadamard"}], ids=str)
def test_is_the_layer_over_its_dense_weight(net, kind, tmp_path):
    plain, model = (adapted(base, "abc", 8, **kind) for base in (dense_copy(net), net))
    if "basis" in kind:  # the adapter's inputs alone are scaled, and its file has the scale
        for layer in (*layers(plain), *layers(model)):
            layer.set_input_scale("default", torch.linspace(0.1, 3, layer.in_features))
    assert len(layers(model)) == 3 and "3 RandLoRA layers" in accelerated.kernel_summary(model)
    x, grads = torch.randn(6, 64), []
    for each in (plain, model):
        inputs = x.clone().requires_grad_()
        each(inputs).float().square().sum().backward()
        named = {n: p.grad for n, p in each.named_parameters() if "randlora_" in n}
        grads.append([inputs.grad, *(named[name] for name in sorted(named))])
    with torch.no_grad():
        assert relative(model(x), plain(x)) < 1e-3  # these layers may compute in 16 bits
    for ours, want in zip(grads[1], grads[0], strict=True):
        assert relative(ours, want) < 1e-2
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert relative(opened(tmp_path, model.unload)(x), plain(x)) < 1e-3


def test_merging(net):
    """What PEFT's backend can do, else its error, with nothing changed."""
    model = adapted(net, "abc", 8, sparse=True).eval()
    x = torch.randn(6, 64)
    with torch.no_grad():
        before = model(x)
        if layers(model)[0].quantization_backend.supports_merge:
            want = dense_copy(model.base_model.model)  # by calling the adapted layers
            model.merge_adapter()
            assert relative(model(x), want(x)) < 0.2  # 4 bits again
            randomize(model, seed=1)
            model.unmerge_adapter()
            randomize(model)
            assert torch.equal(model(x), before)  # the old base layer is back
            return
        with pytest.raises(TypeError, match="Merging/unmerging is not available"):
            model.merge_adapter()
        assert torch.equal(model(x), before) and not layers(model)[0].merged
