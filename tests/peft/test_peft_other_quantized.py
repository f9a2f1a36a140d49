"""randlora_ext.peft over HQQ, GPTQ and AWQ layers, which stock RandLoRA refuses.

Skipped without `pip install hqq gptqmodel optimum`.
"""

import pytest
import torch
from peft_helpers import accelerated, adapted, layers, opened, randomize, relative
from torch import nn

pytestmark = [
    pytest.mark.usefixtures("one_thread", "stock_peft"),
    pytest.mark.filterwarnings("ignore"),  # of these packages
]
SIZES = {"a": (64, 128), "b": (128, 64), "c": (64, 64)}
GROUP = 32


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


BASES = {
    "hqq": hqq,
    "gptq": lambda linear: gptqmodel(linear, "gptq", True),
    "awq": lambda linear: gptqmodel(linear, "awq", False),
}


class Net(nn.Module):
    def __init__(self, quantize):
        super().__init__()
        torch.manual_seed(0)
        for name, sizes in SIZES.items():
            setattr(self, name, quantize(nn.Linear(*sizes).requires_grad_(False)))

    def forward(self, x):
        return self.c(self.b(torch.tanh(self.a(x))))


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
    assert len(layers(model)) == 3 and "kernels" in accelerated.kernel_summary(model)
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
            for layer in layers(model):
                layer.merge(keep_weight="nothing")
            model.unmerge_adapter()
            assert 0 < relative(model(x), before) < 0.3
            return
        with pytest.raises(TypeError, match="Merging/unmerging is not available"):
            model.merge_adapter()
        assert torch.equal(model(x), before) and not layers(model)[0].merged
