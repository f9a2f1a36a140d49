"""randlora_ext.peft.accelerate, and parameters that are replaced."""

import pytest
import torch
from peft.tuners.tuners_utils import BaseTuner
from peft_helpers import (
    Deep,
    StockLinear,
    accelerated,
    assert_close,
    config,
    layers,
    made,
    opened,
    peft,
    randomize,
    relative,
    run,
    runs_on_kernels,
    stock_made,
)
from torch import nn

pytestmark = pytest.mark.filterwarnings(
    "ignore:(RandLoRA layers multiply by dense|Found missing|randlora_alpha)"
)


def train(model, optimizer, x, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", [{"very_sparse": True}, {}], ids=str)
def test_accelerate_in_the_middle_of_training(kind, x):
    """Two steps of stock PEFT and then three of ours are five of stock PEFT."""
    model, control = stock_made(**kind), stock_made(**kind)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (model, control)]
    train(model, optimizers[0], x, 2)
    parameters = dict(model.named_parameters())
    for _ in range(2):  # the second time nothing changes
        assert accelerated.accelerate(model) is model
        after = dict(model.named_parameters())
        assert list(after) == list(parameters)
        assert all(after[name] is parameters[name] for name in after)
    train(model, optimizers[0], x, 3)
    train(control, optimizers[1], x, 5)
    assert not torch.equal(model(x), stock_made(**kind)(x))
    torch.testing.assert_close([*model.parameters()], [*control.parameters()], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.bfloat16, 0.03)])
def test_accelerate_a_merged_model_of_several_adapters(dtype, tolerance, tmp_path, x):
    def base():
        return Deep().to(dtype)

    model = stock_made(base=base, sparse=True)
    model.add_adapter("two", config(5, sparse=True, randlora_alpha=100))
    model.base_model.set_adapter(["default", "two"])
    randomize(model, 1)
    x, dy = x.to(dtype), torch.randn(6, 40, dtype=dtype)
    wanted = run(model, x, dy)
    model.merge_adapter()
    accelerated.accelerate(model)
    assert runs_on_kernels(model) and relative(model(x), wanted[0]) < tolerance
    model.unmerge_adapter()
    assert_close(run(model, x, dy), wanted, tolerance)
    model.set_adapter("default")
    model.save_pretrained(tmp_path)  # as stock's
    assert relative(opened(tmp_path, base)(x), model(x)) < tolerance


def test_accelerate_an_injected_model(x):
    model = randomize(peft.inject_adapter_in_model(config(5, sparse=True), Deep()))
    dy = torch.randn(6, 40)
    wanted = run(model, x, dy)
    accelerated.accelerate(model)
    assert runs_on_kernels(model)
    assert_close(run(model, x, dy), wanted, 1e-5)


def lora_model():
    return peft.get_peft_model(Deep(), peft.LoraConfig(target_modules=["a"]))


@pytest.mark.parametrize("make", [Deep, lora_model], ids=["plain", "LoRA"])
def test_a_model_without_randlora_cannot_be_accelerated(make):
    with pytest.raises(ValueError, match="holds no RandLoRA layer of PEFT"):
        accelerated.accelerate(make())


def test_a_model_on_the_meta_device_cannot_be_accelerated():
    with torch.device("meta"):
        model = stock_made()
    with pytest.raises(ValueError, match="basis of adapter 'default' is on the meta device"):
        accelerated.accelerate(model)
    assert {type(layer) for layer in layers(model)} == {StockLinear}


def replace_parameters(model, adapter_name="default", **_):
    """New objects with the same numbers, as `cast_adapter_dtype` makes of 16-bit ones."""
    for layer in layers(model):
        for dictionary in (layer.randlora_lambda, layer.randlora_gamma):
            if adapter_name in dictionary:
                old = dictionary[adapter_name]
                dictionary[adapter_name] = nn.Parameter(old.detach().clone(), old.requires_grad)
                with torch.no_grad():
                    old.fill_(torch.nan)  # whoever holds it computes nonsense


def test_parameters_that_are_replaced(monkeypatch, tmp_path, x):
    """When an adapter is made, and later, also in a compiled model: nobody holds the old ones."""
    dy = torch.ones(6, 40)
    want = run(made(sparse=True), x, dy)
    monkeypatch.setattr(BaseTuner, "_cast_adapter_dtype", replace_parameters)
    model = made(sparse=True)
    for each in (model, torch.compile(model, backend="eager")):
        assert_close(run(each, x, dy), want, 1e-6)
        replace_parameters(model)
        assert_close(run(each, x, dy), want, 1e-6)
    model.save_pretrained(tmp_path)
    loaded = opened(tmp_path)
    loaded.load_adapter(tmp_path, "two")
    for name in ("default", "two"):
        loaded.set_adapter(name)
        assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("call", [accelerated.accelerate, accelerated.kernel_summary])
def test_a_model_that_is_none(call):
    with pytest.raises(TypeError, match="^model must be an nn.Module, got 'abc'$"):
        call("abc")
