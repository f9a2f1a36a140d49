"""randlora_ext.peft: loading a file over an adapter that is there, and whose bases it needs."""

import pytest
import torch
from peft_helpers import Deep, accelerated, deep_config, layers, pair, peft, randomize, relative

pytestmark = pytest.mark.usefixtures("one_thread", "stock_peft")

KEY_ALONE = {"sparse": True, "save_projection": False}
GENERATED = {"basis": "independent", "density": 0.2, "projection_prng_key": 7}


def made(seed=0, **options):
    accelerated.enable()
    chosen = deep_config(cls=accelerated.RandLoraConfig, **({"r": 5} | options))
    return randomize(peft.get_peft_model(Deep(), chosen), seed).eval()


def numbers(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model, before):
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


MISFITS = {
    "key": (
        KEY_ALONE,
        KEY_ALONE | {"projection_prng_key": 9},
        r"projection_prng_key is 9, not 0$",
    ),
    "flags": (
        KEY_ALONE,
        {"very_sparse": True, "save_projection": False},
        "sparse is False, not True\n\tvery_sparse is True, not False$",
    ),
    "uniform": (KEY_ALONE, {"save_projection": False}, "sparse is False, not True$"),
    "density": (
        {"density": 0.1, "save_projection": False},
        {"density": 0.2, "save_projection": False},
        r"density is 0\.2, not 0\.1$",
    ),
    "generated key": (
        GENERATED,
        GENERATED | {"projection_prng_key": 8},
        r"projection_prng_key is 'generated-1:8', not 'generated-1:7'$",
    ),
    "generated over drawn": (
        KEY_ALONE,
        GENERATED,
        r"projection_prng_key is 'generated-1:7', not 0\n\tbasis is 'independent', not 'peft'\n\t"
        r"density is 0\.2, not None",
    ),
}


@pytest.mark.parametrize("own,other,message", MISFITS.values(), ids=MISFITS)
def test_other_bases_are_named_and_nothing_changes(tmp_path, own, other, message):
    made(seed=3, **other).save_pretrained(tmp_path)
    model = made(**own)
    before = numbers(model)
    with pytest.raises(
        ValueError, match=rf"does not fit 'default', which is unchanged:\n\t{message}"
    ):
        model.load_adapter(tmp_path, "default")
    assert_unchanged(model, before)
    # also where the adapter is made of another configuration than the file's
    accelerated.enable()
    chosen = deep_config(cls=accelerated.RandLoraConfig, **({"r": 5} | own))
    with pytest.raises(ValueError, match=message):
        peft.PeftModel.from_pretrained(Deep(), tmp_path, config=chosen)


def test_another_version_of_the_specification(tmp_path):
    made(seed=3, **GENERATED).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace("generated-1:", "generated-2:"))
    model = made(**GENERATED)
    before = numbers(model)
    with pytest.raises(ValueError, match="'generated-2:7', not 'generated-1:7'"):
        model.load_adapter(tmp_path, "default")
    assert_unchanged(model, before)


def test_another_rank_is_told_by_shapes(tmp_path):
    made(seed=3, r=6, **KEY_ALONE).save_pretrained(tmp_path)
    model = made(**KEY_ALONE)
    before = numbers(model)
    with pytest.raises(RuntimeError, match=r"(?s)size mismatch for .*a\.randlora_lambda"):
        model.load_adapter(tmp_path, "default")
    assert_unchanged(model, before)


SAME = {
    "the same": (KEY_ALONE, KEY_ALONE),
    "density 1/3": (KEY_ALONE, {"density": 1 / 3, "save_projection": False}),
    "both flags": (
        {"very_sparse": True, "save_projection": False},
        {"sparse": True, "very_sparse": True, "save_projection": False},
    ),
    "generated without a density": (
        {"basis": "independent"},
        {"basis": "independent", "density": 1 / 3},
    ),
    "uniform": ({"save_projection": False}, {"save_projection": False}),
    "bases in the file": ({"sparse": True}, {"sparse": True, "projection_prng_key": 9}),
    "other kind of bases in the file": ({"sparse": True}, {"density": 0.2}),
}


@pytest.mark.filterwarnings("ignore:RandLoRA layers of this model multiply by dense")
@pytest.mark.parametrize("own,other", SAME.values(), ids=SAME)
def test_what_has_the_same_bases_or_brings_them_loads_in_place(tmp_path, own, other):
    theirs = made(seed=3, **other)
    theirs.save_pretrained(tmp_path)
    model = made(**own)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    model.load_adapter(tmp_path, "default")
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    x = torch.randn(6, 24)
    assert torch.equal(model(x), theirs(x))


def test_alpha_stays_as_in_stock_and_is_told(tmp_path):
    accelerated.disable()
    other = deep_config(5, randlora_alpha=99, **KEY_ALONE)
    randomize(peft.get_peft_model(Deep(), other), seed=3).save_pretrained(tmp_path)
    stock, ours = pair(Deep(), lambda: deep_config(5, **KEY_ALONE))
    stock.load_adapter(tmp_path, "default")
    with pytest.warns(
        UserWarning, match="randlora_alpha of .* is 99, .* keeps its own, 640"
    ) as told:
        ours.load_adapter(tmp_path, "default")
    assert any(warning.filename == __file__ for warning in told)
    x = torch.randn(6, 24)
    assert layers(ours)[0].scaling["default"] == 640 / 5
    assert relative(ours(x), stock(x)) < 1e-6


def test_a_file_without_a_configuration(tmp_path):
    """Stock PEFT reads the tensors; so do we, and say what nobody knows."""
    theirs = made(seed=3, **KEY_ALONE)
    theirs.save_pretrained(tmp_path / "sub" / "folder")
    (tmp_path / "sub/folder/adapter_config.json").unlink()
    model = made(**KEY_ALONE)
    with pytest.warns(UserWarning, match="has no adapter_config.json, so nothing tells"):
        model.load_adapter(tmp_path / "sub", "default", subfolder="folder")
    x = torch.randn(6, 24)
    assert torch.equal(model(x), theirs(x))


def test_a_model_that_was_accelerated_without_enable(tmp_path):
    """Stock PEFT's table is in force then, whose configuration drops the density."""
    made(seed=3, density=0.2, save_projection=False).save_pretrained(tmp_path)
    accelerated.disable()
    model = peft.get_peft_model(Deep(), deep_config(5, save_projection=False))
    accelerated.accelerate(model)
    with pytest.raises(ValueError, match=r"density is 0\.2, not None"):
        model.load_adapter(tmp_path, "default")


def test_models_on_other_layers_pass_through(tmp_path):
    """Stock PEFT's behaviour on stock models and on FourierFT stays, with our methods in force."""
    accelerated.disable()
    stock = randomize(peft.get_peft_model(Deep(), deep_config(5, **KEY_ALONE)))
    accelerated.enable()
    made(seed=3, **KEY_ALONE, projection_prng_key=9).save_pretrained(tmp_path)
    stock.load_adapter(tmp_path, "default")
    fourier = peft.get_peft_model(Deep(), peft.FourierFTConfig(n_frequency=9, target_modules=["a"]))
    fourier.save_pretrained(tmp_path / "fourier")
    fourier.load_adapter(tmp_path / "fourier", "default")
    assert (tmp_path / "fourier/adapter_model.safetensors").exists()
