"""randlora_ext.peft: block bases, which no matrix of a whole model holds."""

import copy

import pytest
import torch
from peft_helpers import (
    Deep,
    accelerated,
    assert_close,
    assert_unchanged,
    config,
    deep_config,
    layers,
    made,
    numbers,
    peft,
    randomize,
    relative,
    run,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

import randlora_ext
from randlora_ext.reference import delta_weight_reference

pytestmark = [
    pytest.mark.usefixtures("one_thread", "stock_peft"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]
BLOCK = {"basis": "block", "density": 1 / 4, "projection_prng_key": 7}
KEY = "randlora_ext:block-1:density={}:seed={}"


class Mixed(Deep):
    """Layers of two shapes: wide, tall without bias, wide of another D in Conv1D."""

    def __init__(self):
        super().__init__()
        self.b, self.c = nn.Linear(40, 24, bias=False), Conv1D(32, 24)
        nn.init.normal_(self.c.weight, std=0.2)


def model_of(base=Mixed, **options):
    return made(base=base, r=8, **(BLOCK | options))


def matrices(layer, name="default", density=1 / 4, seed=7):
    """The layer's A and B in float64."""
    sizes = layer.in_features, layer.out_features, layer.r[name]
    return randlora_ext.TernaryBasis(*sizes, density, seed, "block").dense(dtype=torch.float64)


def delta_of(layer, lam, gam, name="default", **basis):
    """dW by the reference, oriented as the base layer's weight."""
    A, B = matrices(layer, name, **basis)
    sizes = layer.out_features, layer.in_features
    delta = delta_weight_reference(A, B, lam, gam, layer.scaling[name], *sizes)
    return delta.T if layer.fan_in_fan_out else delta


def by_reference(model, x, dy):
    """y, dx and the gradients of lambda and gamma in float64, through W + dW."""
    weights, leaves = {}, {}
    for path, layer in model.base_model.model.named_modules():
        if layer in layers(model):
            for name in ("lambda", "gamma"):
                leaf = getattr(layer, f"randlora_{name}")["default"].detach().double()
                leaves[path, name] = leaf.requires_grad_()
            delta = delta_of(layer, leaves[path, "lambda"], leaves[path, "gamma"])
            weights[f"{path}.weight"] = layer.get_base_layer().weight.detach().double() + delta
            if layer.get_base_layer().bias is not None:
                weights[f"{path}.bias"] = layer.get_base_layer().bias.detach().double()
    x = x.detach().double().requires_grad_()
    y = torch.func.functional_call(Mixed().double(), weights, x)
    given = [leaves[path, name] for path in "abc" for name in ("lambda", "gamma")]
    return [y, *torch.autograd.grad(y, [x, *given], dy.double())]


@pytest.fixture(params=[False, True], ids=["kernels", "plain torch"])
def hidden(request, monkeypatch):
    """Whether the CPU passes for a device without kernels."""
    if request.param:
        hide(monkeypatch)
    return request.param


def hide(monkeypatch):
    for module in (randlora_ext.ops.functional, randlora_ext.peft.layer):
        monkeypatch.setattr(module, "serve", lambda kind: False)


@pytest.mark.parametrize(
    "dtype,tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 0.03)]
)
@pytest.mark.parametrize("dropout", [0.0, 1e-13])  # with dropout weight and adapter are apart
def test_output_and_gradients_are_those_of_the_reference(hidden, dtype, tolerance, dropout):
    accelerated.enable()
    fields = BLOCK | {"randlora_dropout": dropout}
    chosen = deep_config(8, accelerated.RandLoraConfig, **fields)
    model = randomize(peft.get_peft_model(Mixed().to(dtype), chosen))
    torch.manual_seed(1)
    x, dy = torch.randn(2, 9, 24).to(dtype), torch.randn(2, 9, 32).to(dtype)
    results = run(model, x, dy)
    assert results[0].dtype == dtype
    wanted = by_reference(model, x, dy)
    for result, expected in zip(results, wanted, strict=True):
        assert relative(result, expected) < tolerance
    for layer in layers(model):
        lam, gam = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
        want = delta_of(layer, lam.detach().double(), gam.detach().double())
        assert relative(layer.get_delta_weight("default"), want) < max(tolerance, 1e-6)
        first, second = layer.get_scaled_bases("default")
        dense = (second @ first) * layer.scaling["default"]
        assert relative(dense.T if layer.fan_in_fan_out else dense, want) < max(tolerance, 1e-5)


def test_the_density_is_an_eighth_and_the_text_says_all():
    accelerated.enable()
    chosen = accelerated.RandLoraConfig(basis="block", projection_prng_key=42)
    assert (chosen.density, chosen.projection_prng_key) == (1 / 8, KEY.format(0.125, 42))
    alone = accelerated.RandLoraConfig(projection_prng_key=chosen.projection_prng_key)
    assert (alone.basis, alone.density, alone.save_projection) == ("block", 1 / 8, False)


def test_layers_that_do_not_fit_are_named_and_nothing_changes(tmp_path):
    class Odd(Mixed):
        def __init__(self):
            super().__init__()
            self.c = nn.Linear(24, 36)

    wanted = (
        r"layer 'b' does not fit: block bases of density=1/8 .* got 40, 24 and r=8; densities "
        r"that fit all 2 targeted layers: 1/2, 1/4\. .* another r, or leave that layer out of"
    )
    base, two = Odd(), config(8, accelerated.RandLoraConfig, ["b", "c"])
    accelerated.enable()
    chosen = config(8, accelerated.RandLoraConfig, ["b", "c"], basis="block")
    before = numbers(base)
    with pytest.raises(ValueError, match=wanted):
        peft.get_peft_model(base, chosen)
    with pytest.raises(ValueError, match="layer 'b' does not fit"):
        peft.inject_adapter_in_model(chosen, base)
    assert_unchanged(base, before)
    assert type(base.b) is nn.Linear and all(p.requires_grad for p in base.parameters())

    model = randomize(peft.get_peft_model(base, two))
    before = numbers(model)
    with pytest.raises(ValueError, match=wanted):
        model.add_adapter("two", chosen)
    assert_unchanged(model, before)
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match="no density fits all 2 targeted layers. Take another r"):
        fields = {"cls": accelerated.RandLoraConfig, "targets": ["b", "c"], "basis": "block"}
        model.add_adapter("two", config(5, **fields))

    model_of(Odd, density=1 / 4).save_pretrained(tmp_path)
    narrower = Odd()
    narrower.b = nn.Linear(42, 24)
    with pytest.raises(ValueError, match="layer 'b' .* 42, 24 .* that fit all 3 .*: 1/2"):
        peft.PeftModel.from_pretrained(narrower, tmp_path)
    assert type(narrower.a) is nn.Linear


def test_adapters_of_every_kind_stand_side_by_side(tmp_path):
    model = model_of()
    others = {
        "seed": {"basis": "block", "density": 1 / 4, "projection_prng_key": 8},
        "coarse": {"basis": "block", "density": 1 / 2},
        "independent": {"basis": "independent"},
        "sparse": {"sparse": True, "save_projection": False},
    }
    for name, options in others.items():
        model.add_adapter(name, deep_config(8, accelerated.RandLoraConfig, **options))
    randomize(model, 2).eval()
    x = torch.randn(6, 24)
    outputs = {}
    for name in ("default", *others):
        model.set_adapter(name)
        outputs[name] = model(x)
    with model.disable_adapter():
        outputs["__base__"] = model(x)
    names = ["coarse", "default", "__base__", "independent", "seed", "sparse"]
    mixed = model(x, adapter_names=names)
    for row, name in enumerate(names):
        assert relative(mixed[row], outputs[name][row]) < 1e-5
    model.save_pretrained(tmp_path)
    for name in others:
        alone = peft.PeftModel.from_pretrained(Mixed(), tmp_path / name).eval()
        assert torch.equal(alone(x), outputs[name])
    model.base_model.set_adapter(["default", "coarse"])
    both, c = model(x), model.base_model.model.c
    model.merge_adapter()
    assert c.merged_adapters == ["default", "coarse"] and relative(model(x), both) < 1e-5
    model.unmerge_adapter()
    assert relative(model(x), both) < 1e-5
    model.delete_adapter("default")
    model.set_adapter("coarse")
    assert relative(model(x), outputs["coarse"]) < 1e-5
    assert relative(model.merge_and_unload()(x), outputs["coarse"]) < 1e-5


def test_merging_copying_and_casting(tmp_path, hidden):
    model = model_of()
    x = torch.randn(6, 24)
    y = model(x)
    again = copy.deepcopy(model)
    assert torch.equal(again(x), y)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(x), y)
    for layer in layers(again):
        lam, gam = (p["default"].double() for p in (layer.randlora_lambda, layer.randlora_gamma))
        want = layer.get_base_layer().weight.double() + delta_of(layer, lam, gam)
        layer.merge(safe_merge=True)
        assert relative(layer.get_base_layer().weight, want) < 1e-6
    assert relative(again(x), y) < 1e-5
    again.unmerge_adapter()
    assert relative(again(x), y) < 1e-5
    assert relative(model.double()(x.double()), y) < 1e-5
    assert relative(model.to(torch.bfloat16)(x.bfloat16()), y) < 0.05
    assert not any("randlora_A" in key or "randlora_B" in key for key in model.state_dict())


def test_what_would_need_one_matrix_for_all_layers_is_refused(tmp_path):
    model = model_of()
    A = model.base_model.randlora_A["default"]
    assert A.shape == (8, 1, 40)  # as PEFT reads them
    for use in (A.dense, lambda: A + 1, lambda: A.to("meta") * 2):
        with pytest.raises(RuntimeError, match="of block bases have no dense form"):
            use()
    before = numbers(model)
    message = (
        r"layer 'a' has 24 -> 40 features, layer 'c' 24 -> 32; merge instead "
        r"\(export_to_peft\(\.\.\., merged=True\)"
    )
    with pytest.raises(ValueError, match=message):
        accelerated.export_to_peft(model, tmp_path / "peft")
    assert list(tmp_path.rglob("*.*")) == []
    assert_unchanged(model, before)
    accelerated.export_to_peft(model, tmp_path / "merged", merged=True)
    plain = Mixed()
    from safetensors.torch import load_model

    load_model(plain, tmp_path / "merged" / "model.safetensors")
    x = torch.randn(6, 24)
    assert relative(plain(x), model(x)) < 1e-5


@pytest.mark.parametrize("targets", [["a", "c"], ["b"], ["a", "b", "c"]], ids=str)
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_stock_opens_what_is_exported_of_one_shape(tmp_path, targets):
    """Transposed or not: PEFT's own bases are as large as the largest in and out."""
    accelerated.enable()
    chosen = config(8, accelerated.RandLoraConfig, targets, **BLOCK)
    model = randomize(peft.get_peft_model(Deep(), chosen))
    x = torch.randn(6, 24)
    accelerated.export_to_peft(model, tmp_path)
    for switch in (accelerated.disable, accelerated.enable):
        switch()
        loaded = peft.PeftModel.from_pretrained(Deep(), tmp_path)
        assert relative(loaded(x), model(x)) < 1e-6
        assert loaded.peft_config["default"].projection_prng_key == 7


def test_devices_without_kernels_say_so(monkeypatch):
    monkeypatch.setenv("RANDLORA_PATH", "factored")
    model = model_of(Deep)
    model.add_adapter("two", deep_config(5, accelerated.RandLoraConfig, basis="independent"))
    randomize(model)
    told = accelerated.kernel_summary(model)
    assert "2x 24->40 r=8 block density 0.25 factored" in told
    assert "default: r=8 block density 0.25 factored at 512 tokens" in repr(model)
    x = torch.randn(6, 24)
    model.set_adapter("two")
    wanted = model(x)
    hide(monkeypatch)
    with pytest.warns(UserWarning, match="dense bases: there are no randlora_ext kernels"):
        assert relative(model(x), wanted) < 1e-5
    model.set_adapter("default")
    assert accelerated.kernel_summary(model) == (
        "3 layers by plain torch on block bases: there are no randlora_ext kernels for device "
        "type 'cpu'"
    )
    assert "24->40; default: r=8 plain torch on block bases; two: r=5 dense bases" in repr(model)


def test_layers_of_one_shape_share_what_is_packed():
    model = model_of(Deep)
    a, b, c = (layer.basis_of("default", torch.device("cpu"))[0] for layer in layers(model))
    assert a is c and b.packed()[0] is a.packed()[0]


@pytest.mark.parametrize("bits", [8, 4, "torchao"])
@pytest.mark.filterwarnings("ignore:.*(rounding errors|4-bit)")
def test_quantized_base_layers(bits):
    accelerated.enable()
    if bits == "torchao":
        torchao = pytest.importorskip("torchao.quantization")
        base = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
        torchao.quantize_(base, torchao.Int8WeightOnlyConfig())
        targets = "02"
    else:
        from test_peft_quantized import Quantized

        base, targets = Quantized(bits), "abc"
    chosen = config(8, accelerated.RandLoraConfig, targets, basis="block", projection_prng_key=7)
    model = randomize(peft.get_peft_model(base, chosen))
    for layer in layers(model) or [m for m in model.modules() if hasattr(m, "randlora_lambda")]:
        x, dy = torch.randn(5, layer.in_features), torch.randn(5, layer.out_features)
        lam, gam = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
        leaves = [t.detach().double().requires_grad_() for t in (x, lam, gam)]
        delta = delta_of(layer, *leaves[1:], density=1 / 8)
        part = leaves[0] @ delta.T
        x.requires_grad_()
        y = layer(x) - layer.get_base_layer()(x)
        wanted = [part, *torch.autograd.grad(part, leaves[1:], dy.double())]
        results = [y, *torch.autograd.grad(y, [lam, gam], dy)]
        assert_close([t.double() for t in results], wanted, 1e-5)
        assert relative(layer.get_delta_weight("default"), delta) < 1e-6
    if bits != "torchao":
        x = torch.randn(5, 64)
        before = model.eval()(x)
        model.merge_adapter(safe_merge=True)
        assert relative(model(x), before) < {8: 0.03, 4: 0.3}[bits]
