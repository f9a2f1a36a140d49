"""randlora_ext.peft: enable and disable; which PEFT; what a model says of itself."""

import os
import sys

import pytest
import torch
from layer_cases import run_python
from peft.tuners.tuners_utils import BaseTuner
from peft_helpers import (
    RANDLORA,
    Deep,
    StockLinear,
    accelerated,
    assert_close,
    config,
    inputs,
    layers,
    made,
    opened,
    pair,
    peft,
    run,
    runs_on_kernels,
    stock_made,
)
from torch import nn

import randlora_ext
from randlora_ext import _C
from randlora_ext.peft.layer import AcceleratedLinear

pytestmark = pytest.mark.filterwarnings(
    "ignore:(RandLoRA layers multiply by dense|Found missing|randlora_alpha)"
)


OURS = os.path.dirname(randlora_ext.__file__)


def tables():
    maps = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING
    return tuple(each[RANDLORA] for each in maps)


@pytest.fixture
def restored(monkeypatch):
    """What enable() sets is restored at the end."""
    for name in ("keep_weight", "float32_products"):
        monkeypatch.setattr(AcceleratedLinear, name, getattr(AcceleratedLinear, name))


IN_16_BITS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@IN_16_BITS
def test_products_in_float32_are_those_of_stock(restored, dtype):
    stock, model = pair(Deep().to(dtype), lambda: config(5))
    x, dy = inputs(24, 40, dtype)
    accelerated.enable(float32_products=True)
    assert_close(run(model, x, dy), run(stock, x, dy), torch.finfo(dtype).eps)


@IN_16_BITS
def test_products_in_float32_can_be_turned_off(restored, dtype):
    _, model = pair(Deep().to(dtype), lambda: config(5))
    x, _ = inputs(24, 40, dtype)
    narrow = model(x)
    accelerated.enable(float32_products=True)
    assert not torch.equal(model(x), narrow)
    accelerated.enable(float32_products=False)
    assert torch.equal(model(x), narrow)


def test_what_enable_is_not_told_stays(restored):
    accelerated.enable(float32_products=True, keep_weight="nothing")
    accelerated.enable()
    accelerated.enable(keep_weight="device")
    assert AcceleratedLinear.float32_products and AcceleratedLinear.keep_weight == "device"


def test_an_unknown_place_to_keep_weights(restored):
    with pytest.raises(ValueError, match="keep_weight must be one of .*got 'disk'"):
        accelerated.enable(keep_weight="disk")


def test_enable_twice_replaces_both_tables():
    accelerated.disable()
    stock = tables()
    accelerated.enable()
    accelerated.enable()
    assert all(one is not other for one, other in zip(stock, tables(), strict=True))


def test_disable_puts_both_tables_back():
    accelerated.disable()
    stock = tables()
    accelerated.enable()
    accelerated.enable()
    accelerated.disable()
    assert tables() == stock


def test_a_model_that_is_made_after_disable_is_stock():
    accelerated.enable()
    accelerated.disable()
    model = peft.get_peft_model(Deep(), config(5, sparse=True))
    assert type(model.base_model) is peft.tuners.randlora.RandLoraModel
    assert {type(layer) for layer in layers(model)} == {StockLinear}


def test_a_model_that_was_made_before_disable_stays_on_our_kernels():
    accelerated.enable()
    model = peft.get_peft_model(Deep(), config(5, sparse=True))
    accelerated.disable()
    model.add_adapter("two", config(5, sparse=True))
    assert runs_on_kernels(model)


def replaced():
    """What of PEFT's classes is not PEFT's own."""
    owners = peft.PeftModel, peft.config.PeftConfigMixin, peft.PeftConfig, BaseTuner, StockLinear
    return {
        f"{owner.__name__}.{name}"
        for owner in owners
        for name, value in vars(owner).items()
        if getattr(getattr(value, "__code__", None), "co_filename", "").startswith(OURS)
    }


def test_disable_leaves_nothing_of_ours():
    accelerated.disable()
    assert not replaced()
    own = peft.PeftModel.save_pretrained
    accelerated.accelerate(stock_made())
    assert not replaced()
    for _ in range(2):
        accelerated.enable()
        assert replaced() == {"PeftModel.save_pretrained"}
    for _ in range(2):
        accelerated.disable()
        assert not replaced() and peft.PeftModel.save_pretrained is own


@pytest.mark.parametrize("enabled", [False, True])
def test_a_user_of_lora_never_meets_our_code(tmp_path, enabled):
    lora = peft.LoraConfig(r=3, target_modules=["a"])
    peft.get_peft_model(Deep(), lora).save_pretrained(tmp_path)
    accelerated.enable()
    if not enabled:
        accelerated.disable()
    met = set()

    def profile(frame, event, argument):
        if frame.f_code.co_filename.startswith(OURS):
            met.add(frame.f_code.co_name)

    sys.setprofile(profile)
    try:
        peft.PeftConfig.from_pretrained(tmp_path)
        model = opened(tmp_path)
        model.load_adapter(tmp_path, "two")
        model.load_adapter(tmp_path, "default")
        if not enabled:
            model.save_pretrained(tmp_path / "again")
    finally:
        sys.setprofile(None)
    assert not met


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
import torch
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
    without, layer = run_python("-c", OURS_FIRST).splitlines()
    assert "`pip install -U 'peft>=0.20'`" in without
    assert layer == "AcceleratedLinear"


def test_a_newer_peft_is_warned_of(monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.99.0.dev0")
    with pytest.warns(UserWarning, match=r"tested with PEFT 0\.20 to .*, found 0\.99\.0\.dev0"):
        accelerated.check_version()


def test_an_old_peft_is_refused(monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.19.1")
    with pytest.raises(ImportError, match=r"pip install.*peft>=0\.20.*found 0\.19\.1"):
        accelerated.check_version()


# ---- what a model says of its kernels ------------------------------------------------------------

SAID = {
    "dense": ({}, "r=5 dense by torch's GEMMs (basis='hadamard' costs about LoRA's)"),
    "hadamard": ({"basis": "hadamard"}, f"r=5 hadamard (not calibrated) by {_C.isa()} kernels"),
}


@pytest.mark.parametrize("case", SAID)
def test_a_summary_counts_layers_by_what_computes_them(case):
    options, said = SAID[case]
    assert f"2x 24->40 {said}" in accelerated.kernel_summary(made(**options))


@pytest.mark.parametrize("case", SAID)
def test_a_printed_model_says_what_computes_each_layer(case):
    options, said = SAID[case]
    assert f"24->40; default: {said}" in repr(made(**options))


def test_a_summary_and_a_printed_model_say_that_an_adapter_is_calibrated(x):
    model = made(basis="hadamard")
    for layer in layers(model):
        torch.nn.init.zeros_(layer.randlora_lambda["default"])
    randlora_ext.calibrate(model, [x])
    assert "r=5 hadamard (calibrated) by" in accelerated.kernel_summary(model)
    assert "r=5 hadamard (calibrated) by" in repr(model)


def test_a_printed_model_says_what_is_merged():
    model = made(density=0.2)
    model.merge_adapter()
    assert f"default: r=5 density 0.2 by {_C.isa()} kernels, merged" in repr(model)


def test_a_summary_of_a_stock_model():
    summary = accelerated.kernel_summary(stock_made(sparse=True))
    assert "3x on PEFT's own code: made without" in summary


def test_a_summary_of_a_model_without_adapters():
    assert accelerated.kernel_summary(nn.Linear(2, 2)) == "no RandLoRA layers"
