"""randlora_ext.peft over base layers that are no nn.Linear, which stock RandLoRA refuses.

Those of HQQ, GPTQ and AWQ are skipped without hqq, gptqmodel and optimum; `Rounded` stands in.
"""

import pytest
import torch
from peft.utils import quantization_utils
from peft.utils.quantization_utils import HqqBackend
from peft_helpers import (
    accelerated,
    adapted,
    layers,
    opened,
    randomize,
    relative,
)
from quantized_nets import SIZES, Net
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore")  # of these packages

GROUP = 32


def hqq(linear):
    module = pytest.importorskip("hqq.core.quantize")
    chosen = module.BaseQuantizeConfig(nbits=4, group_size=64)
    options = {"compute_dtype": torch.float32, "device": "cpu", "del_orig": False}
    return module.HQQLinear(linear, chosen, **options)


def gptqmodel(linear, method, sym):
    """Rounds to 4 bits, by groups of inputs and without data."""
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    if method == "gptq":
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


@pytest.fixture(params=[{"sparse": True}, {}, {"basis": "hadamard"}], ids=str)
def both(request, net):
    """(over the dense weight of a quantized model, over that model)"""
    models = [adapted(base, "abc", 8, **request.param) for base in (dense_copy(net), net)]
    if "basis" in request.param:
        for layer in (*layers(models[0]), *layers(models[1])):
            layer.set_input_scale("default", torch.linspace(0.1, 3, layer.in_features))
    return models


@pytest.fixture
def x():
    return torch.randn(6, 64)


def test_a_summary_counts_the_layers(net):
    model = adapted(net, "abc", 8, sparse=True)
    assert len(layers(model)) == 3 and "3 RandLoRA layers" in accelerated.kernel_summary(model)


@torch.no_grad()
def test_the_output_is_that_of_the_layer_over_its_dense_weight(both, x):
    plain, model = both
    assert relative(model(x), plain(x)) < 1e-3  # these layers may compute in 16 bits


def gradients(model, x):
    inputs = x.clone().requires_grad_()
    model(inputs).float().square().sum().backward()
    named = {name: p.grad for name, p in model.named_parameters() if "randlora_" in name}
    return [inputs.grad, *(named[name] for name in sorted(named))]


def test_gradients_are_those_of_the_layer_over_its_dense_weight(both, x):
    plain, model = both
    for ours, want in zip(gradients(model, x), gradients(plain, x), strict=True):
        assert relative(ours, want) < 1e-2


@torch.no_grad()
def test_a_saved_adapter_comes_back(both, x, tmp_path):
    plain, model = both
    model.save_pretrained(tmp_path)
    assert relative(opened(tmp_path, model.unload)(x), plain(x)) < 1e-3


@torch.no_grad()
def test_merging_and_unmerging(net, x):
    model = adapted(net, "abc", 8, sparse=True).eval()
    if not layers(model)[0].quantization_backend.supports_merge:
        pytest.skip("PEFT's backend cannot merge")
    before = model(x)
    want = dense_copy(model.base_model.model)  # by calling the adapted layers
    model.merge_adapter()
    assert relative(model(x), want(x)) < 0.2  # rounded again
    randomize(model, seed=1)
    model.unmerge_adapter()
    randomize(model)
    assert torch.equal(model(x), before)  # the old base layer is back


@torch.no_grad()
def test_where_peft_cannot_merge_its_error_leaves_everything(net, x):
    model = adapted(net, "abc", 8, sparse=True).eval()
    if layers(model)[0].quantization_backend.supports_merge:
        pytest.skip("PEFT's backend can merge")
    before = model(x)
    with pytest.raises(TypeError, match="Merging/unmerging is not available"):
        model.merge_adapter()
    assert torch.equal(model(x), before) and not layers(model)[0].merged
