"""`hotswap_adapter`: a file of the same bases in the place of an adapter that is running."""

import math

import pytest
import torch
from language_models import llama
from peft_helpers import (
    Deep,
    Headed,
    accelerated,
    adapted,
    assert_unchanged,
    config,
    edit,
    edited,
    layers,
    made,
    numbers,
    peft,
    randomize,
    relative,
    stock_made,
)

pytestmark = pytest.mark.filterwarnings("ignore:RandLoRA layers multiply by dense")

TENSORS = "adapter_model.safetensors"
KEY_ALONE = {"sparse": True, "save_projection": False}
SEED = {"basis": "independent", "density": 0.2, "projection_prng_key": 7}
HADAMARD = {"basis": "hadamard", "projection_prng_key": 7}
DRAWN = {"density": 0.1, "save_projection": False}
VERY_SPARSE = {"very_sparse": True, "save_projection": False}


MISFITS = {
    "key": (KEY_ALONE, KEY_ALONE | {"projection_prng_key": 9}, "sparse, .*_key=9, not .*_key=0$"),
    "flags": (KEY_ALONE, VERY_SPARSE, "PEFT's, very_sparse, of .*, not PEFT's, sparse, of"),
    "uniform": (KEY_ALONE, {"save_projection": False}, "uniform, of .*, not PEFT's, sparse"),
    "density": (DRAWN, DRAWN | {"density": 0.2}, r"density=0\.2:.*, not .*density=0\.1:seed=0$"),
    "seed of signs": (HADAMARD, HADAMARD | {"projection_prng_key": 8}, "seed=8, not .*seed=7$"),
    "kind of a seed": (HADAMARD, SEED, r"independent-1:density=0\.2:seed=7, not .*hadamard-1:"),
}


@pytest.mark.parametrize("own,other,message", MISFITS.values(), ids=MISFITS)
def test_other_bases_are_named_and_nothing_changes(tmp_path, own, other, message):
    made(seed=3, **other).save_pretrained(tmp_path)
    model = made(**own)
    before = numbers(model)
    with pytest.raises(ValueError, match=rf"(?s)does not fit 'default'.*:\n\t.*{message}"):
        accelerated.hotswap_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_a_model_that_was_accelerated_without_enable(tmp_path):
    """Stock PEFT's table is in force then, whose configuration drops the density."""
    made(seed=3, density=0.2, save_projection=False).save_pretrained(tmp_path)
    model = accelerated.accelerate(stock_made(save_projection=False))
    with pytest.raises(ValueError, match=r"density=0\.2:seed=0, not PEFT's, uniform"):
        accelerated.hotswap_adapter(model, tmp_path)


@pytest.fixture
def beside_another(tmp_path):
    """(stock PEFT's model, which is saved, a model with an active and an inactive adapter)"""
    stock = stock_made(seed=3, sparse=True)
    stock.save_pretrained(tmp_path)
    model = made(sparse=True)
    model.add_adapter("two", config(5, sparse=True))
    return stock, randomize(model, 4)


def test_an_inactive_adapter_is_replaced_by_a_file_of_stock(tmp_path, beside_another, x):
    stock, model = beside_another
    accelerated.hotswap_adapter(model, tmp_path, "two")
    model.set_adapter("two")
    assert relative(model(x), stock(x)) < 1e-6


def test_the_active_adapter_stays_when_an_inactive_one_is_replaced(tmp_path, beside_another, x):
    _, model = beside_another
    before = model(x)
    accelerated.hotswap_adapter(model, tmp_path, "two")
    assert torch.equal(model(x), before)


def test_a_targeted_output_layer(tmp_path):
    """PEFT saves the base weight of a targeted lm_head with the adapter."""
    options = {"targets": ["lm_head"], "basis": "hadamard"}
    first, second = (adapted(llama(num_hidden_layers=1), seed=s, **options) for s in (1, 2))
    second.save_pretrained(tmp_path, save_embedding_layers=True)
    accelerated.hotswap_adapter(first, tmp_path)
    x = torch.arange(6).view(1, 6)
    assert torch.equal(first(x).logits, second(x).logits)


# ---- what is refused -----------------------------------------------------------------------------


def refuses_to_swap(model, folder, message):
    before = numbers(model)
    with pytest.raises((TypeError, ValueError), match=message):
        accelerated.hotswap_adapter(model, folder)
    assert_unchanged(model, before)
    assert layers(model)[0].scaling["default"] == 640 / 5


HEAD = {"base": Headed, "modules_to_save": ["head"]}
OTHER_OPTIONS = {
    "r": ({"r": 6}, r"r is 6, not 5\n\t.*a\.randlora_lambda is \(6, 4\), and must be "),
    "dropout": ({"randlora_dropout": 0.5}, r"randlora_dropout is 0\.5, not 0\.0"),
}


@pytest.mark.parametrize("options, message", OTHER_OPTIONS.values(), ids=OTHER_OPTIONS)
def test_other_options(tmp_path, options, message):
    made(seed=3, **SEED, **options).save_pretrained(tmp_path)
    refuses_to_swap(made(**SEED), tmp_path, rf"(?s)does not fit 'default'.*:\n\t.*{message}")


@pytest.mark.parametrize("alpha", ["64", None, True, pytest.param(10**400, id="huge"), math.nan])
def test_an_alpha_that_is_no_number(tmp_path, alpha):
    made(seed=3, **SEED).save_pretrained(tmp_path)
    edit(tmp_path / "adapter_config.json", randlora_alpha=alpha)
    refuses_to_swap(made(**SEED), tmp_path, "randlora_alpha must be a finite number, got ")


@pytest.fixture
def with_head(tmp_path):
    """A folder of an adapter with modules_to_save."""
    made(seed=3, **SEED, **HEAD).save_pretrained(tmp_path)
    return tmp_path


def test_a_head_that_the_model_does_not_have(with_head):
    refuses_to_swap(made(**SEED), with_head, "head.* is not part")


def test_wrong_shapes_and_dtypes_are_told_together(with_head):
    with edited(with_head) as state:
        state["base_model.model.head.weight"] = torch.ones(4, 40)
        state["base_model.model.c.randlora_gamma"] = torch.ones(5, 24, dtype=torch.int64)
    message = r"(?s)c.randlora_gamma is torch.int64, and must be flo"
    message += r".*head.weight is \(4, 40\), and must be \(3, 40\)"
    refuses_to_swap(made(seed=2, **SEED, **HEAD), with_head, message)


def test_a_missing_tensor(with_head):
    with edited(with_head) as state:
        del state["base_model.model.b.randlora_lambda"]
    message = f"{with_head}: base_model.model.b.randlora_lambda is missing"
    refuses_to_swap(made(seed=2, **SEED, **HEAD), with_head, message)


def test_a_damaged_file(with_head):
    weights = with_head / TENSORS
    weights.write_bytes(weights.read_bytes()[:-1])
    refuses_to_swap(made(seed=2, **SEED, **HEAD), with_head, f"{weights} is damaged")


def test_a_folder_without_a_configuration(tmp_path):
    made(seed=3, **SEED).save_pretrained(tmp_path / "sub")
    (tmp_path / "sub/adapter_config.json").unlink()
    with pytest.raises(OSError, match=r"sub/adapter_config\.json"):
        accelerated.hotswap_adapter(made(**SEED), tmp_path, subfolder="sub")


def test_a_name_that_is_no_folder():
    with pytest.raises(ValueError, match="'HUB/NAME' is no folder here, and not on the hub: "):
        accelerated.hotswap_adapter(made(**SEED), "HUB/NAME")


def test_an_adapter_that_the_model_does_not_have(tmp_path):
    model = made(sparse=True)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapter_name must be one of \['default'\], got 'two'"):
        accelerated.hotswap_adapter(model, tmp_path, "two")


def test_a_file_of_another_method(tmp_path):
    lora = peft.get_peft_model(Deep(), peft.LoraConfig(r=3, target_modules=["a"]))
    lora.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="peft_type must be RANDLORA, got 'LORA'"):
        accelerated.hotswap_adapter(made(sparse=True), tmp_path)


@pytest.mark.parametrize("make", [lambda: stock_made(sparse=True), Deep], ids=["stock", "no PEFT"])
def test_a_model_on_other_layers(tmp_path, make):
    made(sparse=True).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="needs a PeftModel on randlora_ext's layers, got "):
        accelerated.hotswap_adapter(make(), tmp_path)
