"""randlora_ext.peft: enable and disable; which PEFT; what a model says of itself."""

import os
import sys

import pytest
import torch
from layer_cases import run_python
from peft_helpers import (
    RANDLORA,
    Deep,
    StockLinear,
    accelerated,
    config,
    layers,
    made,
    opened,
    peft,
    runs_on_kernels,
    stock_made,
)
from torch import nn

import randlora_ext
from randlora_ext import _C
from randlora_ext.peft.config import NEEDS_OURS

pytestmark = pytest.mark.filterwarnings(
    "ignore:(RandLoRA layers multiply by dense|Found missing|randlora_alpha)"
)


OURS = os.path.dirname(randlora_ext.__file__)


def tables():
    maps = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING
    return tuple(each[RANDLORA] for each in maps)


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
    assert type(model.base_model) is peft.RandLoraModel
    assert {type(layer) for layer in layers(model)} == {StockLinear}


def test_a_model_that_was_made_before_disable_stays_on_our_kernels():
    accelerated.enable()
    model = peft.get_peft_model(Deep(), config(5, sparse=True))
    accelerated.disable()
    model.add_adapter("two", config(5, sparse=True))
    assert runs_on_kernels(model)


# Prints what differs from PEFT as it is before we are imported: attributes of its modules and
# classes that are other objects, entries of its dictionaries that are other or new.
DIFFERENCES = """
import sys, peft, transformers.integrations.peft, torch

def everything():
    owners = [m for name, m in sys.modules.items() if name.partition(".")[0] == "peft"]
    owners += [transformers.integrations.peft, torch.nn.Module]
    classes = (c for m in owners for c in vars(m).values() if isinstance(c, type))
    owners += {c for c in classes if c.__module__.startswith(("peft.", "transformers.integr"))}
    found = {}
    for owner in owners:
        for name, value in vars(owner).items():
            found[owner, name] = value
            if type(value) is dict and name != "__builtins__":
                found |= {(owner, f"{name}[{str(key)}]"): each for key, each in value.items()}
    return found

before = everything()

def tell(when):
    now = everything()
    other = {name for owner, name in before if now.get((owner, name)) is not before[owner, name]}
    new = {name for owner, name in now.keys() - before.keys() if name.endswith("]")}
    print(when, sorted(other | new))

import randlora_ext.peft as ours
tell("imported")
ours.enable()
tell("enabled")
model = peft.get_peft_model(
    torch.nn.Sequential(torch.nn.Linear(8, 9)), ours.RandLoraConfig(r=4, target_modules=["0"])
)
ours.enable()
tell("in use")
ours.disable()
tell("disabled")
"""
TABLES = [
    "PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.RANDLORA]",
    f"PEFT_TYPE_TO_CONFIG_MAPPING[{NEEDS_OURS}]",
    "PEFT_TYPE_TO_TUNER_MAPPING[PeftType.RANDLORA]",
]


def test_only_entries_of_peft_s_two_tables_are_replaced():
    told = run_python("-c", DIFFERENCES).splitlines()
    assert told == [
        "imported []", f"enabled {TABLES}", f"in use {TABLES}", "disabled []"
    ]  # fmt: skip


def train_and_save(model, folder):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(6, 24)).square().sum().backward()
    optimizer.step()
    model.save_pretrained(folder)


@pytest.mark.parametrize("enabled", [False, True])
def test_a_user_of_lora_never_meets_our_code(tmp_path, enabled):
    accelerated.enable()
    if not enabled:
        accelerated.disable()
    met = set()

    def profile(frame, event, argument):
        if frame.f_code.co_filename.startswith(OURS):
            met.add(frame.f_code.co_qualname)

    sys.setprofile(profile)
    try:
        lora = peft.LoraConfig(r=3, target_modules=["a"])
        train_and_save(peft.get_peft_model(Deep(), lora), tmp_path)
        assert peft.PeftConfig.from_pretrained(tmp_path).r == 3
        model = opened(tmp_path, is_trainable=True)
        model.load_adapter(tmp_path, "two")
        model.load_adapter(tmp_path, "default", is_trainable=True)
        model.set_adapter("default")
        model.load_state_dict(model.state_dict())
        train_and_save(model, tmp_path)
        model.merge_and_unload()
    finally:
        sys.setprofile(None)
    assert not met


@pytest.mark.filterwarnings("error")
def test_what_was_made_too_early_is_told():
    with pytest.warns(UserWarning, match=r"enable\(\) has not been called: until it is") as caught:
        early = config(5, accelerated.RandLoraConfig, sparse=True)
    assert len(caught) == 1 and caught[0].filename == config.__code__.co_filename
    assert type(peft.get_peft_model(Deep(), early).base_model) is peft.RandLoraModel
    accelerated.enable()
    late = config(5, accelerated.RandLoraConfig, sparse=True)
    assert runs_on_kernels(peft.get_peft_model(Deep(), late))


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
    assert "`pip install -U 'peft>=0.21'`" in without
    assert layer == "AcceleratedLinear"


def test_a_newer_peft_is_warned_of(monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.99.0.dev0")
    with pytest.warns(UserWarning, match=r"tested with PEFT 0\.21 to .*, found 0\.99\.0\.dev0"):
        accelerated.check_version()


def test_an_old_peft_is_refused(monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.19.1")
    with pytest.raises(ImportError, match=r"pip install.*peft>=0\.21.*found 0\.19\.1"):
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


def test_a_summary_counts_a_layer_with_two_adapters_once():
    model = made(basis="hadamard")
    model.add_adapter("two", config(4, accelerated.RandLoraConfig, basis="hadamard"))
    model.base_model.set_adapter(["default", "two"])
    summary = accelerated.kernel_summary(model)
    assert summary.startswith("3 RandLoRA layers: ") and "2x 24->40 r=4" in summary


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


def test_a_summary_of_what_is_no_model():
    with pytest.raises(TypeError, match="^model must be an nn.Module, got 'abc'$"):
        accelerated.kernel_summary("abc")
