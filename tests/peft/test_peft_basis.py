"""randlora_ext.peft: bases that are only a seed, and the text that describes them."""

import copy
import dataclasses
import json
import re

import pytest
import torch
from peft.utils.save_and_load import load_peft_weights
from peft_helpers import (
    Deep,
    accelerated,
    config,
    edit,
    made,
    opened,
    peft,
)
from safetensors.torch import load_file
from torch import nn

KEY = "randlora_ext:independent-1:density={}:seed={}"


DESCRIBED = {
    "independent": {"basis": "independent", "density": 0.07, "projection_prng_key": 2**64 - 1},
    "hadamard": {"basis": "hadamard", "save_projection": True},  # which is overruled
}


OPTIONS = pytest.mark.parametrize("options", DESCRIBED.values(), ids=DESCRIBED)
TENSORS = "adapter_model.safetensors"


# ---- files ---------------------------------------------------------------------------------------


@OPTIONS
def test_a_file_holds_no_bases(tmp_path, options):
    made(**options).save_pretrained(tmp_path)
    keys = list(load_file(tmp_path / TENSORS))
    ours = (
        "randlora_lambda",
        "randlora_gamma",
        "randlora_input_scale",
        "randlora_record._extra_state",
    )
    assert keys and all(key.endswith(ours) for key in keys)


@OPTIONS
def test_low_cpu_mem_usage_draws_no_dense_bases(tmp_path, options, x):
    model = made(**options)
    model.save_pretrained(tmp_path)
    loaded = opened(tmp_path, low_cpu_mem_usage=True)
    assert loaded.peft_config["default"].density == model.peft_config["default"].density
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(RuntimeError, match="no dense form here"):
        loaded.base_model.randlora_A["default"].dense()


@OPTIONS
def test_what_low_cpu_mem_usage_has_loaded_is_saved_again(tmp_path, options, x):
    model = made(**options)
    model.save_pretrained(tmp_path)
    opened(tmp_path, low_cpu_mem_usage=True).save_pretrained(tmp_path / "again")
    assert torch.equal(opened(tmp_path / "again")(x), model(x))


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_loading_on_a_16_bit_base_rounds_nothing(tmp_path, autocast, low_cpu_mem_usage):
    """Unless it is told to keep the dtype of the base."""
    made(basis="hadamard").save_pretrained(tmp_path)
    saved = load_file(tmp_path / TENSORS)
    options = {"low_cpu_mem_usage": low_cpu_mem_usage, "autocast_adapter_dtype": autocast}
    model = opened(tmp_path, lambda: Deep().bfloat16(), **options)
    for name, layer in model.base_model.model.named_children():
        for part in ("randlora_lambda", "randlora_gamma"):
            want = saved[f"base_model.model.{name}.{part}"]
            got = getattr(layer, part)["default"]
            assert got.dtype == (torch.float32 if autocast else torch.bfloat16)
            assert torch.equal(got, want.to(got.dtype))


@OPTIONS
def test_stock_peft_does_not_open_the_file(tmp_path, options):
    made(**options).save_pretrained(tmp_path)
    accelerated.disable()
    with pytest.raises(KeyError):
        peft.PeftConfig.from_pretrained(tmp_path)


# ---- the text alone decides the bases ------------------------------------------------------------


class Saved:
    """A saved model; a round trip through stock PEFT has left of its configuration the text."""

    def __init__(self, options, folder):
        self.options = {"projection_prng_key": 3} | options
        self.model = made(**self.options)
        self.model.save_pretrained(folder)
        accelerated.disable()
        edit(folder / "adapter_config.json", peft_type="RANDLORA")
        with pytest.warns(UserWarning, match="'basis', 'density'"):
            read_by_stock = peft.PeftConfig.from_pretrained(folder)
        read_by_stock.save_pretrained(folder)
        self.fields = json.loads((folder / "adapter_config.json").read_text())
        assert not {"basis", "density"} & self.fields.keys()
        accelerated.enable()


@pytest.fixture(params=DESCRIBED)
def saved(request, tmp_path):
    return Saved(DESCRIBED[request.param], tmp_path)


def by_from_pretrained(saved, folder):
    return opened(folder)


def by_a_configuration_of_the_text_alone(saved, folder):
    key = saved.fields["projection_prng_key"]
    chosen = config(5, accelerated.RandLoraConfig, projection_prng_key=key)
    return opened(folder, config=chosen)


def by_load_adapter_over_another(saved, folder):
    model = made(seed=4, **saved.options)
    model.load_adapter(folder, "default")
    return model


def by_load_adapter_beside_another(saved, folder):
    model = made(seed=4, **saved.options | {"projection_prng_key": 8})
    model.load_adapter(folder, "two")
    model.set_adapter("two")
    return model


def by_injection(saved, folder):
    model = peft.inject_adapter_in_model(peft.PeftConfig.from_pretrained(folder), Deep())
    peft.set_peft_model_state_dict(model, load_peft_weights(folder, device="cpu"))
    return model


DOORS = [
    by_from_pretrained,
    by_a_configuration_of_the_text_alone,
    by_load_adapter_over_another,
    by_load_adapter_beside_another,
    by_injection,
]


@pytest.mark.parametrize("door", DOORS)
def test_the_text_alone_decides_the_bases(saved, tmp_path, door, x):
    assert torch.equal(door(saved, tmp_path)(x), saved.model(x))


# ---- configurations ------------------------------------------------------------------------------

CHOSEN = [
    ({"basis": "independent"}, KEY.format(1 / 3, 0), "independent", 1 / 3),
    ({"density": 0.2, "projection_prng_key": 9}, KEY.format(0.2, 9), "independent", 0.2),
    ({"basis": "hadamard"}, "randlora_ext:hadamard-1:seed=0", "hadamard", None),
    ({"sparse": True}, 0, "peft", None),
]


def again_from_the_text(chosen):
    key, sparse = chosen.projection_prng_key, chosen.sparse
    return accelerated.RandLoraConfig(projection_prng_key=key, sparse=sparse)


AGAIN = {
    "itself": lambda chosen: chosen,
    "dictionary": lambda chosen: accelerated.RandLoraConfig(**chosen.to_dict()),
    "replace": dataclasses.replace,
    "copy": copy.copy,
    "text": again_from_the_text,
}


@pytest.mark.parametrize("again", AGAIN)
@pytest.mark.parametrize("options, key, basis, density", CHOSEN, ids=str)
def test_a_configuration_holds_the_text_and_each_thing_once(options, key, basis, density, again):
    accelerated.enable()
    each = AGAIN[again](accelerated.RandLoraConfig(**options))
    assert (each.projection_prng_key, each.basis, each.density) == (key, basis, density)


def test_without_a_basis_a_configuration_has_the_fields_of_stock():
    accelerated.enable()
    assert accelerated.RandLoraConfig().to_dict() == peft.RandLoraConfig().to_dict()


BAD_OPTIONS = [
    ({"alpha": 16}, "RandLoraConfig.* got an .* argument 'alpha'"),
    ({"basis": "indep"}, "basis must be one of .*got 'indep'; did you mean 'independent'"),
    ({"density": 0.1, "sparse": True}, "sparse is of PEFT's own bases; .* takes a density"),
    ({"basis": "independent", "projection_prng_key": -1}, r"projection_prng_key .*got -1"),
    ({"projection_prng_key": 2**64}, r"projection_prng_key must .* in \[-2\*\*63, 2\*\*64\)"),
    ({"projection_prng_key": "generated-1:0"}, "'generated-1:0' is no key of a basis"),
    ({"projection_prng_key": KEY.replace("-1", "-2").format(0.1, 0)}, "independent-2.* knows"),
    ({"projection_prng_key": KEY.format(0.1, 0), "basis": "independent", "density": 0.2},
     r"contradicts .*density=0\.2"),
    ({"projection_prng_key": KEY.format(0.1, 0), "sparse": True}, "contradicts .*'sparse'"),
    ({"projection_prng_key": KEY.format(0.1, 0), "basis": "hadamard"},
     "contradicts basis='hadamard'"),
    ({"randlora_alpha": 10**400}, "randlora_alpha must be a finite number, got an integer of 1329"),
    ({"randlora_alpha": "64"}, "randlora_alpha must be a finite number, got '64'"),
    ({"modules_to_save": "head"}, "modules_to_save must be a list of names or None, got 'head'"),
    ({"randlora_dropout": 1.0}, r"randlora_dropout must be a number in \[0, 1\), got 1.0"),
    ({"bias": "some"}, "bias must be one of .*got 'some'"),
]  # fmt: skip


@pytest.mark.parametrize("options, message", BAD_OPTIONS, ids=lambda value: str(value)[:40])
def test_bad_options(options, message):
    accelerated.enable()
    with pytest.raises((TypeError, ValueError), match=message):
        config(5, accelerated.RandLoraConfig, **options)


CHANGED = [
    ("basis", "independent", "contradicts basis='independent'"),
    ("density", 0.5, r"contradicts .*density=0\.5"),
]


@pytest.mark.parametrize("name, value, message", CHANGED)
def test_a_configuration_that_was_changed(name, value, message):
    """To what contradicts the key, which says all."""
    accelerated.enable()
    changed = config(5, accelerated.RandLoraConfig, basis="hadamard")
    setattr(changed, name, value)
    model = nn.Sequential(nn.Linear(24, 40))
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(model, changed)
    assert type(model[0]) is nn.Linear


def test_seeds_of_one_configuration(tmp_path, x):
    accelerated.enable()
    first = config(5, accelerated.RandLoraConfig, basis="hadamard")
    second = dataclasses.replace(first, projection_prng_key=7)
    assert second.basis_description.seed == 7 and second.basis == "hadamard"
    first.projection_prng_key = 7
    first.save_pretrained(tmp_path)
    read = accelerated.RandLoraConfig.from_pretrained(tmp_path)
    assert second.basis_description == first.basis_description == read.basis_description


# ---- on stock PEFT -------------------------------------------------------------------------------


@pytest.fixture
def described(tmp_path):
    """A saved model on independent bases; stock PEFT is in force."""
    options = {"basis": "independent", "density": 0.1, "randlora_alpha": 9}
    model = made(task_type="FEATURE_EXTRACTION", **options)
    model.save_pretrained(tmp_path)
    accelerated.disable()
    return model


HOW = "needs randlora_ext: import randlora_ext.peft; randlora_ext.peft.enable()"


@pytest.mark.filterwarnings("error")  # nothing else is told before
@pytest.mark.parametrize("read", [opened, peft.PeftConfig.from_pretrained])
def test_a_recipient_with_stock_peft_is_told_what_opens_the_file(tmp_path, described, read):
    with pytest.raises(KeyError, match=f"^'RANDLORA; {re.escape(HOW)}'$"):
        read(tmp_path)


def test_other_programs_find_the_task_where_they_look_for_it(tmp_path, described):
    accelerated.enable()
    read = peft.PeftConfig.from_pretrained(tmp_path)
    assert read.task_type == "FEATURE_EXTRACTION" and read.peft_type == "RANDLORA"


def test_a_configuration_with_a_basis_needs_enable():
    accelerated.disable()
    with pytest.raises(RuntimeError, match=r"needs randlora_ext\.peft\.enable\(\)"):
        config(cls=accelerated.RandLoraConfig, basis="hadamard")


def test_stock_peft_draws_no_other_bases_from_our_configuration(described):
    with pytest.raises(Exception, match="expected a long, but got str"):
        peft.get_peft_model(Deep(), described.peft_config["default"])
