"""randlora_ext.peft: enable, disable and accelerate; which PEFT; what a model says of itself."""

import subprocess
import sys

import pytest
import torch
from peft_helpers import (
    RANDLORA,
    Deep,
    StockLinear,
    accelerated,
    assert_close,
    config,
    layers,
    made,
    opened,
    pair,
    peft,
    randomize,
    relative,
    run,
    runs_on_kernels,
    stock_made,
)
from safetensors import safe_open
from torch import nn

from randlora_ext import _C, RandLoraLinear
from randlora_ext.peft.layer import AcceleratedLinear

pytestmark = pytest.mark.filterwarnings("ignore:RandLoRA layers multiply by dense")


def tables():
    mapping = peft.mapping
    return (
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING[RANDLORA],
        mapping.PEFT_TYPE_TO_TUNER_MAPPING[RANDLORA],
    )


@pytest.fixture
def settings_restored(monkeypatch):
    for name in ("keep_weight", "float32_products"):
        monkeypatch.setattr(AcceleratedLinear, name, getattr(AcceleratedLinear, name))


def test_enable_says_what_merged_layers_keep(settings_restored):
    layer = layers(made(sparse=True))[0]
    weight = layer.get_base_layer().weight
    W = weight.detach().clone()
    with pytest.raises(ValueError, match="keep_weight must be one of .*got 'disk'"):
        accelerated.enable(keep_weight="disk")
    for keep, way in (("host", True), ("device", True), ("nothing", False)):
        accelerated.enable(keep_weight=keep)
        accelerated.enable()  # by somebody else
        layer.merge()
        assert (layer._kept is not None) == way
        layer.unmerge()
        assert torch.equal(weight, W) or not way


def test_what_enable_is_not_told_stays(settings_restored):
    model, x = made(base=lambda: Deep().bfloat16()), torch.randn(6, 24).bfloat16()
    accelerated.enable(float32_products=True, keep_weight="nothing")
    wide = model(x)
    accelerated.enable()
    accelerated.enable(keep_weight="device")
    assert torch.equal(model(x), wide)
    accelerated.enable(float32_products=False)
    assert not torch.equal(model(x), wide)
    assert AcceleratedLinear.keep_weight == "device"


def test_enable_twice_and_disable(tmp_path):
    stock = tables()
    assert stock == (peft.RandLoraConfig, peft.tuners.randlora.RandLoraModel)
    accelerated.disable()
    accelerated.enable()
    accelerated.enable()
    assert all(one is not other for one, other in zip(stock, tables(), strict=True))
    for method in (peft.PeftModel.save_pretrained, peft.PeftModel.load_adapter):
        assert method.__wrapped__.__module__ == "peft.peft_model"  # once
    inside = peft.get_peft_model(Deep(), config(5, sparse=True))
    accelerated.disable()
    assert tables() == stock
    outside = peft.get_peft_model(Deep(), config(5, sparse=True))
    assert type(outside.base_model) is peft.tuners.randlora.RandLoraModel
    assert {type(layer) for layer in layers(outside)} == {StockLinear}
    inside.add_adapter("two", config(5, sparse=True))
    assert runs_on_kernels(inside)
    for model, records in ((inside, True), (outside, False)):
        model.save_pretrained(tmp_path)
        file = safe_open(tmp_path / "adapter_model.safetensors", "pt")
        assert ("randlora_ext" in file.metadata()) == records


@pytest.mark.filterwarnings("error")
def test_what_was_made_too_early_is_told():
    with pytest.warns(UserWarning, match=r"enable\(\) has not been called: until it is") as caught:
        early = config(5, accelerated.RandLoraConfig, sparse=True)
    assert len(caught) == 1 and caught[0].filename == config.__code__.co_filename
    model = peft.get_peft_model(Deep(), early)
    accelerated.enable()
    config(5, accelerated.RandLoraConfig, sparse=True)
    assert runs_on_kernels(accelerated.accelerate(model))


# The other tests import peft before us. What is absent to the end would take seconds to import.
OURS_FIRST = """
import sys
sys.modules |= dict.fromkeys(["peft", "transformers", "accelerate", "bitsandbytes", "torchao"])
import torch, randlora_ext
model = torch.nn.Sequential(torch.nn.Linear(12, 20))
randlora_ext.apply_randlora(model, target_modules=["0"], r=4)
model(torch.randn(3, 12)).sum().backward()
assert model[0].randlora_lambda["default"].grad.any()
try:
    import randlora_ext.peft
except ImportError as error:
    print(error)
for name in ("peft", "transformers", "accelerate"):
    del sys.modules[name]
import randlora_ext.peft as ours; ours.enable(); from peft import *; import transformers
config = RandLoraConfig(r=4, target_modules=["0"], sparse=True)
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 9)), config)
print(type(model.base_model.model[0]).__name__)
"""


def test_without_peft_and_imported_before_it():
    told = subprocess.run([sys.executable, "-c", OURS_FIRST], capture_output=True, text=True).stdout
    without, layer = told.splitlines()
    assert "`pip install -U 'peft>=0.20'`" in without
    assert layer == "AcceleratedLinear"


def test_old_or_newer_peft(monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.99.0.dev0")
    with pytest.warns(UserWarning, match=r"tested with PEFT 0\.20 to .*, found 0\.99\.0\.dev0"):
        accelerated.check_version()
    monkeypatch.setattr(peft, "__version__", "0.19.1")
    with pytest.raises(ImportError, match=r"pip install.*peft>=0\.20.*found 0\.19\.1"):
        accelerated.check_version()


def test_what_a_model_says_of_its_kernels():
    stock, ours = pair(Deep(), lambda: config(5, sparse=True))
    text, kernels = accelerated.kernel_summary(ours), f"by {_C.isa()} kernels"
    assert "\n" not in text and text.startswith("3 RandLoRA layers: ")
    assert "2x 24->40 r=5 density 0.3" in text and "1x 40->24" in text
    assert text.count(kernels) == 2
    independent = made(basis="independent", density=0.2)
    assert f"r=5 density 0.2 {kernels}" in accelerated.kernel_summary(independent)
    assert "3x on PEFT's own code: made without" in accelerated.kernel_summary(stock)
    assert accelerated.kernel_summary(nn.Linear(2, 2)) == "no RandLoRA layers"
    layer = RandLoraLinear(nn.Linear(2, 2), r=1)
    assert f": 1x 2->2 r=1 hadamard {kernels}" in accelerated.kernel_summary(layer)
    independent.merge_adapter()
    assert f"default: r=5 density 0.2 {kernels}, merged" in repr(independent)
    dense = "r=5 dense by torch's GEMMs (basis='hadamard' costs about LoRA's)"
    for model, told in ((made(), dense), (made(basis="hadamard"), f"r=5 hadamard {kernels}")):
        assert f"2x 24->40 {told}" in accelerated.kernel_summary(model)
        assert f"24->40; default: {told}" in repr(model)


def test_jit_trace_is_refused_by_name():
    model, x = made(sparse=True), torch.randn(3, 24)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot record .* torch\.export"):
        torch.jit.trace(model.base_model.model, (x,))
    model.merge_adapter()
    assert torch.equal(torch.jit.trace(model.base_model.model, (x,))(x), model(x))


def train(model, optimizer, steps):
    generator = torch.Generator().manual_seed(2)
    losses = []
    for _ in range(steps):
        loss = (model(torch.randn(6, 24, generator=generator)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", [{"very_sparse": True}, {}], ids=str)
def test_accelerate_in_the_middle_of_training(kind):
    """Two steps of stock PEFT and then three of ours are five of stock PEFT."""
    model, control = stock_made(**kind), stock_made(**kind)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (model, control)]
    assert train(model, optimizers[0], 2) == train(control, optimizers[1], 2)
    parameters = dict(model.named_parameters())
    for _ in range(2):  # the second time nothing changes
        assert accelerated.accelerate(model) is model
        after = dict(model.named_parameters())
        assert list(after) == list(parameters)
        assert all(after[name] is parameters[name] for name in after)
    losses = train(model, optimizers[0], 3)
    assert losses == pytest.approx(train(control, optimizers[1], 3), rel=1e-5)
    for mine, theirs in zip(model.parameters(), control.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_accelerate_several_adapters_and_dtypes(dtype, x):
    model = stock_made(base=lambda: Deep().to(dtype), sparse=True)
    model.add_adapter("two", config(5, sparse=True, randlora_alpha=100))
    model.base_model.set_adapter(["default", "two"])
    randomize(model, 1)
    x, dy = x.to(dtype), torch.randn(6, 40, dtype=dtype)
    wanted = run(model, x, dy)
    accelerated.accelerate(model)
    assert runs_on_kernels(model)
    assert_close(run(model, x, dy), wanted, 1e-10 if dtype is torch.float64 else 0.02)


def test_accelerate_a_merged_and_an_injected_model(tmp_path, x):
    model, dy = stock_made(sparse=True), torch.randn(6, 40)
    weight, before = layers(model)[0].weight.clone(), model(x)
    model.merge_adapter()
    accelerated.accelerate(model)
    assert relative(model(x), before) < 1e-5
    model.unmerge_adapter()
    torch.testing.assert_close(layers(model)[0].weight, weight)
    model.save_pretrained(tmp_path)  # as stock's
    assert relative(opened(tmp_path)(x), before) < 1e-6
    accelerated.disable()
    injected = randomize(peft.inject_adapter_in_model(config(5, sparse=True), Deep()))
    wanted = run(injected, x, dy)
    accelerated.accelerate(injected)
    assert runs_on_kernels(injected)
    assert_close(run(injected, x, dy), wanted, 1e-5)


def test_what_cannot_be_accelerated():
    fourier = peft.get_peft_model(Deep(), peft.FourierFTConfig(n_frequency=9, target_modules=["a"]))
    for model in (Deep(), fourier):
        with pytest.raises(ValueError, match="holds no RandLoRA layer of PEFT"):
            accelerated.accelerate(model)
    with torch.device("meta"):
        model = stock_made()
    with pytest.raises(ValueError, match="basis of adapter 'default' is on the meta device"):
        accelerated.accelerate(model)
    assert {type(layer) for layer in layers(model)} == {StockLinear}
