"""`RandLoraConfig(merged_rounding=...)`: in the layers, and in no file that stock PEFT opens."""

import json

import pytest
import torch
import torch.nn.functional as F
from peft_helpers import Deep, accelerated, deep_config, layers, made, peft

from randlora_ext import merged_weight

pytestmark = pytest.mark.usefixtures("one_thread", "stock_peft")

ROUNDINGS = pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
INDEPENDENT = {"basis": "independent", "density": 0.2, "projection_prng_key": 11}
BASES = pytest.mark.parametrize(
    "options", [{"sparse": True}, {"density": 0.2}, INDEPENDENT], ids=str
)


def low():
    return Deep().bfloat16()


def x_of(tokens=6):
    return torch.randn(tokens, 24, generator=torch.Generator().manual_seed(1)).bfloat16()


@BASES
@ROUNDINGS
def test_layers_multiply_by_the_rounded_weight(monkeypatch, options, rounding):
    monkeypatch.setenv("RANDLORA_PATH", "merged")
    model = made(base=low, merged_rounding=rounding, **options)
    layer, x = layers(model)[0], x_of()
    basis, _ = layer.basis_of("default", x.device)
    seed = None if rounding == "nearest" else basis.seed or 0
    assert (basis.seed == 11) == (options is INDEPENDENT)
    lam, gam = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
    weight = merged_weight(basis, layer.weight, lam, gam, layer.scaling["default"], seed)
    assert torch.equal(layer(x), F.linear(x, weight, layer.base_layer.bias))


def test_each_adapter_has_its_own():
    model = made(base=low, merged_rounding="nearest", **INDEPENDENT)
    model.add_adapter("other", deep_config(5, accelerated.RandLoraConfig, **INDEPENDENT))
    for layer in layers(model):
        assert layer.merged_rounding == {"default": "nearest", "other": None}
    stock = peft.get_peft_model(low(), deep_config(5, sparse=True))  # PEFT's own class of config
    assert all(layer.merged_rounding == {"default": None} for layer in layers(stock))


@BASES
def test_the_summary_tells_the_path(options):
    without, model = (
        made(base=low, merged_rounding=rounding, **options) for rounding in (None, "nearest")
    )
    assert "merged" not in accelerated.kernel_summary(without, 10**6)
    assert "merged" in accelerated.kernel_summary(model, 10**6)


@pytest.mark.parametrize(
    "options, written",
    [
        ({"sparse": True}, False),
        ({"very_sparse": True, "save_projection": False}, False),
        ({"density": 0.2, "save_projection": True}, False),  # stock PEFT reads these bases
        ({"density": 0.2, "save_projection": False}, True),
        (INDEPENDENT, True),
    ],
    ids=str,
)
def test_files(tmp_path, options, written):
    model = made(merged_rounding="stochastic", **options)
    model.save_pretrained(tmp_path / "with")
    made(**options).save_pretrained(tmp_path / "without")
    with_it, without = (
        json.loads((tmp_path / folder / "adapter_config.json").read_text())
        for folder in ("with", "without")
    )
    assert "merged_rounding" not in without
    assert with_it == without | ({"merged_rounding": "stochastic"} if written else {})
    loaded = peft.PeftModel.from_pretrained(Deep(), tmp_path / "with")
    for layer in layers(loaded):
        assert layer.merged_rounding == {"default": "stochastic" if written else None}
    # What a file does not hold is set on its configuration.
    config = peft.PeftConfig.from_pretrained(tmp_path / "with")
    config.merged_rounding = "nearest"
    loaded = peft.PeftModel.from_pretrained(Deep(), tmp_path / "with", config=config)
    assert all(layer.merged_rounding == {"default": "nearest"} for layer in layers(loaded))
    x = torch.randn(3, 24)
    assert torch.equal(loaded(x), model.eval()(x))
    if not written and options.get("save_projection", True):
        accelerated.disable()
        stock = peft.PeftModel.from_pretrained(Deep(), tmp_path / "with")
        torch.testing.assert_close(stock(x), model(x))


def test_errors():
    with pytest.raises(RuntimeError, match=r"merged_rounding='nearest' needs .*enable\(\)"):
        deep_config(5, accelerated.RandLoraConfig, sparse=True, merged_rounding="nearest")
    accelerated.enable()
    message = r"merged_rounding must be one of \(None, 'nearest', 'stochastic'\), got 'up'"
    with pytest.raises(ValueError, match=message):
        deep_config(5, accelerated.RandLoraConfig, sparse=True, merged_rounding="up")
    config, base = deep_config(5, accelerated.RandLoraConfig, sparse=True), Deep()
    config.merged_rounding = "up"
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(base, config)
    assert all(type(module) is torch.nn.Linear for module in base.children())
