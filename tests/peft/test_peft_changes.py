"""randlora_ext.peft: what a call reuses from the one before is dropped when it becomes wrong."""

import pytest
import torch
from layer_cases import delta_by_reference
from peft.tuners.tuners_utils import BaseTuner
from peft_helpers import (
    accelerated,
    adapted,
    assert_close,
    config,
    layers,
    made,
    opened,
    peft,
    randomize,
    relative,
    run,
)
from torch import nn

from randlora_ext import Basis
from randlora_ext.peft.bases import new_bases


def of_peft(A, B):
    return Basis.from_dense(A.flatten(1), B.flatten(1), 24, 40)


class Expected:
    """A layer of two adapters, and by hand what it must compute."""

    def __init__(self):
        base = nn.Sequential(nn.Linear(24, 40))
        self.model = adapted(base, "0", basis="hadamard", projection_prng_key=1)
        drawn = config(3, accelerated.RandLoraConfig, "0", sparse=True)
        self.model.add_adapter("two", drawn)
        (self.layer,) = layers(randomize(self.model))
        self.bases = {
            "default": Basis(24, 40, 5, seed=1),
            "two": of_peft(*new_bases(drawn, 40, 24)),
        }
        self.scales = {}
        self.key = drawn.projection_prng_key

    def replace_bases(self):
        self.choose_two()
        self.assert_right()
        self.key += 1
        other = config(
            3, accelerated.RandLoraConfig, "0", sparse=True, projection_prng_key=self.key
        )
        A, B = new_bases(other, 40, 24)
        self.layer.randlora_A["two"], self.layer.randlora_B["two"] = A, B
        self.bases["two"] = of_peft(A, B)

    def scale_inputs(self):
        self.scales["default"] = torch.rand(24) + 0.5
        self.layer.set_input_scale("default", self.scales["default"])

    def set_scaling(self):
        self.layer.scaling["default"] = 3.0

    def change_lambda(self):
        self.layer.randlora_lambda["default"].data.mul_(-2)

    def replace_gamma(self):
        gamma = self.layer.randlora_gamma
        gamma["default"] = nn.Parameter(gamma["default"].detach() / 3)

    def replace_base_layer(self):
        self.layer.base_layer = nn.Linear(24, 40, bias=False)

    def choose_two(self):
        self.model.set_adapter("two")

    def choose_both(self):
        self.model.base_model.set_adapter(["default", "two"])

    def change_weight(self):
        self.layer.base_layer.weight.data.mul_(2)

    def cast(self):
        self.model.double()

    def hook(self):
        self.layer.base_layer.register_forward_hook(lambda module, inputs, output: 2 * output)

    def assert_right(self):
        x = torch.randn(7, 24, dtype=self.layer.base_layer.weight.dtype)
        y = self.layer.base_layer(x).double()
        for name in self.layer.active_adapters:
            lam = self.layer.randlora_lambda[name].double()
            gam = self.layer.randlora_gamma[name].double()
            scaling, scale = self.layer.scaling[name], self.scales.get(name)
            y = y + x.double() @ delta_by_reference(self.bases[name], lam, gam, scaling, scale).T
        assert relative(self.model(x), y) < 1e-6


CHANGES = [
    Expected.replace_bases, Expected.scale_inputs, Expected.set_scaling, Expected.change_lambda,
    Expected.replace_gamma, Expected.replace_base_layer, Expected.choose_two,
    Expected.choose_both, Expected.change_weight, Expected.cast, Expected.hook,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_shows_in_the_next_call(change):
    expected = Expected()
    expected.assert_right()
    change(expected)
    expected.assert_right()


def replace_parameters(model, adapter_name="default", **_):
    """New objects with the same numbers, as PEFT's `cast_adapter_dtype` makes of 16-bit ones."""
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


def test_every_change_on_top_of_the_others_shows_in_the_next_call():
    expected = Expected()
    for change in (*CHANGES, *CHANGES):
        change(expected)
        expected.assert_right()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_should_be_frozen_is_frozen_on_a_base_of_any_dtype(tmp_path, dtype):
    """PEFT's cast of 16 bits to float32 would make it trainable."""
    model = adapted(nn.Sequential(nn.Linear(24, 24)).to(dtype), ["0"], basis="hadamard")
    model.save_pretrained(tmp_path)
    model.add_adapter("two", model.peft_config["default"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 and all(name.endswith(".default") for name in trained)
    base = nn.Sequential(nn.Linear(24, 24)).to(dtype)
    later = peft.PeftModel.from_pretrained(base, tmp_path)
    assert not any(parameter.requires_grad for parameter in later.parameters())
