"""randlora_ext.peft: balanced bases, saved as their description and exported for stock PEFT."""

import json

import pytest
import torch
from peft_helpers import (
    Deep,
    StockLinear,
    accelerated,
    assert_close,
    basis_of,
    deep_config,
    inputs,
    layers,
    peft,
    randomize,
    relative,
    run,
    runs_on_kernels,
)
from safetensors.torch import load_file

from randlora_ext import TernaryBasis

pytestmark = pytest.mark.usefixtures("one_thread", "stock_peft")
BALANCED = {"basis": "generated", "support": "balanced", "density": 1 / 3}


def balanced(r=6, **options):
    return deep_config(r, accelerated.RandLoraConfig, **BALANCED | options)


def made(**options):
    accelerated.enable()
    return randomize(peft.get_peft_model(Deep(), balanced(**options)))


def test_bases_are_those_of_the_specification():
    model = made(projection_prng_key=7)
    assert runs_on_kernels(model)
    assert "r=6 density 0.333 balanced " in accelerated.kernel_summary(model)
    for layer in layers(model):
        sizes = layer.in_features, layer.out_features
        assert basis_of(layer) == TernaryBasis(*sizes, 6, 1 / 3, seed=7, support="balanced")
        A, B = basis_of(layer).dense()  # what PEFT's code would see
        assert torch.equal(layer.randlora_A["default"][:, 0, :24], A)
        assert torch.equal(layer.randlora_B["default"][:40, :4].flatten(1), B)


def test_output_and_gradients_are_those_of_the_dense_formula():
    model = made().double()
    x, dy = inputs(24, 40, torch.float64)
    ours = run(model, x, dy)
    for layer in layers(model):
        layer.__class__ = StockLinear
    assert_close(ours, run(model, x, dy), 1e-6)  # its dense bases round 1 / sqrt(density) to fp32


def test_saved_is_the_description(tmp_path):
    model = made(projection_prng_key=2**64 - 1)
    x = torch.randn(6, 24)
    model.save_pretrained(tmp_path)
    keys = list(load_file(tmp_path / "adapter_model.safetensors"))
    assert keys and all(key.endswith(("randlora_lambda", "randlora_gamma")) for key in keys)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["support"] == "balanced"
    assert saved["projection_prng_key"] == f"generated-2:{2**64 - 1}"
    loaded = peft.PeftModel.from_pretrained(Deep(), tmp_path)
    assert torch.equal(loaded(x), model(x))


def test_independent_is_not_written(tmp_path):
    accelerated.enable()
    config = deep_config(6, accelerated.RandLoraConfig, basis="generated", density=1 / 3)
    assert "support" not in config.to_dict()
    assert config.to_dict()["projection_prng_key"] == "generated-1:0"


@pytest.mark.parametrize(
    "change", [{"projection_prng_key": "generated-1:0"}, {"support": "independent"}], ids=str
)
def test_a_version_that_is_not_that_of_the_support_is_refused(tmp_path, change):
    made().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"projection_prng_key is 'generated-\d:0'; this version"):
        peft.PeftModel.from_pretrained(Deep(), tmp_path)


@pytest.mark.parametrize("safe_serialization", [True, False])
def test_stock_peft_reads_what_is_exported(tmp_path, safe_serialization):
    model = made(projection_prng_key=3)
    x = torch.randn(6, 24)
    want = model(x)
    accelerated.export_to_peft(model, tmp_path, safe_serialization=safe_serialization)
    assert "support" not in json.loads((tmp_path / "adapter_config.json").read_text())
    accelerated.disable()
    stock = peft.PeftModel.from_pretrained(Deep(), tmp_path)
    assert type(layers(stock)[0]) is StockLinear and relative(stock(x), want) < 1e-5
    accelerated.enable()  # and ours, from the dense bases in the file
    ours = peft.PeftModel.from_pretrained(Deep(), tmp_path)
    assert basis_of(layers(ours)[0]).support is None and relative(ours(x), want) < 1e-5


def test_merge_beside_an_independent_adapter():
    model = made()
    independent = deep_config(6, accelerated.RandLoraConfig, basis="generated", density=1 / 3)
    model.add_adapter("two", independent)
    randomize(model, seed=4)
    assert basis_of(layers(model)[0]).support == "balanced"
    two = layers(model)[0].basis_of("two", torch.device("cpu"))[0]
    assert two == TernaryBasis(24, 40, 6, 1 / 3)
    x = torch.randn(6, 24)
    want = model(x)
    model.merge_adapter()
    assert relative(model(x), want) < 1e-5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"basis": "peft"}, "support='balanced' needs basis='generated'.*got basis='peft'"),
        ({"density": None}, "density of q / r, got .*density=None"),
        ({"density": 0.07}, r"density=0\.07 .*r=6 must be q / r .*1/6 = 0\.1666"),
        ({"support": "even"}, r"support must be one of \['independent', 'balanced'\], got 'even'"),
        ({"support": ["balanced"]}, r"support must be one of .* got \['balanced'\]"),
        ({"very_sparse": True}, "contradicts"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    accelerated.enable()
    with pytest.raises(ValueError, match=message):
        balanced(**options)


def test_hotswap_refuses_another_support(tmp_path):
    made().save_pretrained(tmp_path)
    accelerated.enable()
    config = deep_config(6, accelerated.RandLoraConfig, basis="generated", density=1 / 3)
    model = randomize(peft.get_peft_model(Deep(), config))
    with pytest.raises(ValueError, match="support is 'balanced', not 'independent'"):
        accelerated.hotswap_adapter(model, tmp_path)
