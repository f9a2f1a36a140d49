"""randlora_ext.peft: another adapter's numbers in the parameters of one that is loaded."""

import pytest
import torch
from peft_helpers import (
    RANDLORA,
    Deep,
    accelerated,
    deep_config,
    peft,
    randomize,
    relative,
)
from safetensors.torch import load_file, save_file
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread", "stock_peft")

KINDS = {
    "sparse": {"sparse": True},
    "key alone": {"sparse": True, "save_projection": False},
    "density": {"density": 0.2},
    "generated": {"basis": "independent", "projection_prng_key": 7},
    "uniform": {},
}


class Headed(Deep):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(40, 3)

    def forward(self, x):
        return self.head(super().forward(x))


def made(seed=0, base=Deep, **options):
    accelerated.enable()
    options = {"r": 5} | options
    chosen = deep_config(cls=accelerated.RandLoraConfig, **options)
    return randomize(peft.get_peft_model(base(), chosen), seed).eval()


def numbers(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.filterwarnings("ignore:RandLoRA layers of this model multiply by dense")
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_other_adapter_in_the_same_parameters(tmp_path, kind):
    x = torch.randn(6, 24)
    other = made(seed=3, randlora_alpha=99, modules_to_save=["head"], base=Headed, **kind)
    with torch.no_grad():
        other.base_model.model.head.modules_to_save["default"].weight.add_(1)
    other.save_pretrained(tmp_path)
    model = made(modules_to_save=["head"], base=Headed, **kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert relative(model(x), other(x)) > 0.1
    accelerated.hotswap_adapter(model, tmp_path)
    assert torch.equal(model(x), other(x))
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places
    model(x).square().sum().backward()
    optimizer.step()  # on the parameters that it was given
    assert relative(model(x), other(x)) > 1e-3
    # the scaling is saved with the adapter
    accelerated.hotswap_adapter(model, tmp_path)
    model.save_pretrained(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(Headed(), tmp_path / "again")
    assert torch.equal(again(x), other(x))


def test_one_of_several_and_a_file_of_stock(tmp_path):
    stock = randomize(peft.get_peft_model(Deep(), deep_config(5, sparse=True)), 3)
    stock.save_pretrained(tmp_path)
    model = made(sparse=True)
    model.add_adapter("two", deep_config(5, sparse=True))
    randomize(model, 4)
    x = torch.randn(6, 24)
    before = model(x)
    accelerated.hotswap_adapter(model, tmp_path, "two")
    assert torch.equal(model(x), before)
    model.set_adapter("two")
    assert relative(model(x), stock(x)) < 1e-6


def test_bases_of_the_file_serve_where_the_key_is_another(tmp_path):
    other = made(seed=3, sparse=True, projection_prng_key=9)
    other.save_pretrained(tmp_path)
    model = made(sparse=True)
    accelerated.hotswap_adapter(model, tmp_path)
    x = torch.randn(6, 24)
    assert torch.equal(model(x), other(x))


GENERATED = {"basis": "independent", "density": 0.2, "projection_prng_key": 7}
OTHERS = {
    "key": (GENERATED | {"projection_prng_key": 8}, "projection_prng_key is .*:8', not '.*:7'"),
    "density": (GENERATED | {"density": 0.3}, r"density is 0\.3, not 0\.2"),
    "r": (GENERATED | {"r": 6}, r"r is 6, not 5\n\tsize mismatch for .*a\.randlora_gamma"),
    "dropout": (GENERATED | {"randlora_dropout": 0.5}, r"randlora_dropout is 0\.5, not 0\.0"),
    "basis": ({"sparse": True, "save_projection": False}, "basis is 'peft', not 'independent'"),
    "layers": (GENERATED | {"base": Headed, "modules_to_save": ["head"]}, "head.* is not part"),
}


@pytest.mark.parametrize("options,message", OTHERS.values(), ids=OTHERS)
def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path, options, message):
    made(seed=3, randlora_alpha=99, **options).save_pretrained(tmp_path)
    model = made(**GENERATED)
    before, x = numbers(model), torch.randn(6, 24)
    y = model(x)
    with pytest.raises(ValueError, match=rf"(?s)does not fit 'default'.*:\n\t.*{message}"):
        accelerated.hotswap_adapter(model, tmp_path)
    assert torch.equal(model(x), y)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_missing_tensors_and_wrong_shapes_are_named(tmp_path):
    made(**GENERATED, base=Headed, modules_to_save=["head"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    del state["base_model.model.b.randlora_lambda"]
    state["base_model.model.head.weight"] = torch.ones(4, 40)
    state["base_model.model.c.randlora_gamma"] = torch.ones(5, 24, dtype=torch.int64)
    save_file(state, file)
    model = made(seed=2, **GENERATED, base=Headed, modules_to_save=["head"])
    before = numbers(model)
    with pytest.raises(ValueError) as error:
        accelerated.hotswap_adapter(model, tmp_path)
    for message in (
        "b.randlora_lambda is missing",
        "size mismatch for base_model.model.head.weight",
        "dtype mismatch for base_model.model.c.randlora_gamma",
    ):
        assert message in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_models_and_adapters_that_cannot_be_swapped(tmp_path):
    model = made(sparse=True)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapter_name must be one of \['default'\], got 'two'"):
        accelerated.hotswap_adapter(model, tmp_path, "two")
    peft.get_peft_model(
        Deep(), peft.FourierFTConfig(n_frequency=9, target_modules=["a"])
    ).save_pretrained(tmp_path / "fourier")
    with pytest.raises(ValueError, match="peft_type is .*FOURIERFT, not .*RANDLORA"):
        accelerated.hotswap_adapter(model, tmp_path / "fourier")
    model.merge_adapter()
    with pytest.raises(ValueError, match="'default' is merged"):
        accelerated.hotswap_adapter(model, tmp_path)
    accelerated.disable()
    stock = peft.get_peft_model(Deep(), deep_config(5, sparse=True))
    for other in (stock, Deep()):
        with pytest.raises(TypeError, match="needs a PeftModel on randlora_ext's layers, got "):
            accelerated.hotswap_adapter(other, tmp_path)


def test_pefts_own_hotswap_refuses_randlora(tmp_path):
    """It knows LoRA alone, and says so on stock and on ours."""
    from peft.utils.hotswap import hotswap_adapter

    made(sparse=True).save_pretrained(tmp_path)
    for enabled in (False, True):
        accelerated.enable() if enabled else accelerated.disable()
        model = peft.get_peft_model(Deep(), deep_config(5, sparse=True))
        assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[RANDLORA] is (
            accelerated.RandLoraConfig if enabled else peft.RandLoraConfig
        )
        with pytest.raises(ValueError, match="only supports .*LORA but .*RANDLORA was passed"):
            hotswap_adapter(model, str(tmp_path), adapter_name="default", torch_device="cpu")
