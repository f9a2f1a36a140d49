"""export_to_peft: stock PEFT, or nothing but the base model, gives the same numbers."""

import json
import warnings

import pytest
import torch
from cli_helpers import KINDS
from peft_helpers import (
    PEFT,
    Deep,
    Headed,
    StockLinear,
    Wide,
    accelerated,
    adapted,
    assert_close,
    config,
    deltas,
    layers,
    made,
    opened,
    randomize,
    relative,
    shake,
    stock_made,
)
from safetensors.torch import load_file
from torch import nn

GENERATED = {
    "the largest key": {"basis": "independent", "density": 0.07, "projection_prng_key": 2**64 - 1},
    "hadamard, r > d": {"basis": "hadamard", "r": 30},
}
DRAWN = {name: kind for name, kind in KINDS.items() if "basis" not in kind}


def opened_by_stock(folder, base=Deep, **options):
    accelerated.disable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Found missing adapter keys .*randlora_A")
        model = opened(folder, base, **options)
    assert {type(layer) for layer in layers(model)} == {StockLinear}
    return model


@pytest.mark.parametrize("kind", [*GENERATED.values(), *DRAWN.values()], ids=[*GENERATED, *DRAWN])
def test_stock_opens_the_adapter(tmp_path, kind, x):
    model = made(**kind)
    accelerated.export_to_peft(model, tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"adapter_config.json", "README.md", "adapter_model.safetensors"}
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not {"density", "basis"} & set(fields)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    bases = [key for key in saved if key.endswith(("randlora_A", "randlora_B"))]
    assert bases == ["base_model.randlora_A", "base_model.randlora_B"]  # once
    for low_cpu_mem_usage in (True, False):
        loaded = opened_by_stock(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert relative(loaded(x), model(x)) < 1e-6
    accelerated.enable()
    assert relative(opened(tmp_path)(x), model(x)) < 1e-6


def test_hadamard_bases_of_one_size_among_others(tmp_path, x):
    """Layers of other sizes that are no targets, and D of several sizes."""
    model = adapted(Wide(), ["a", "b", "wide", "other"], 7, basis="hadamard")
    accelerated.export_to_peft(model, tmp_path)
    assert relative(opened_by_stock(tmp_path, Wide)(x), model(x)) < 1e-6


def test_hadamard_bases_of_several_sizes_are_refused(tmp_path, x):
    sizes = (24, 40), (40, 24), (24, 20)
    base, plain = (nn.Sequential(*(nn.Linear(*each) for each in sizes)) for _ in range(2))
    model = adapted(base, "012", basis="hadamard")
    message = r"min\(in, out\), which differs .*24: '0', 20: '2'|20: '2', 24: '0'.*; merge instead"
    with pytest.raises(ValueError, match=message):
        accelerated.export_to_peft(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_model_stays_as_it_was_and_every_adapter_is_written(tmp_path, x):
    model = made(basis="independent", density=0.3)
    model.add_adapter("two", config(3, accelerated.RandLoraConfig, basis="independent"))
    randomize(model)
    chosen = model.peft_config["two"]
    accelerated.export_to_peft(model, tmp_path)
    assert model.peft_config["two"] is chosen and chosen.basis == "independent"
    for name, folder in (("default", tmp_path), ("two", tmp_path / "two")):
        model.set_adapter(name)
        assert relative(opened_by_stock(folder)(x), model(x)) < 1e-6
        accelerated.enable()


def test_generated_bases_of_a_bf16_model_are_not_rounded(tmp_path):
    model = adapted(Deep().bfloat16(), "abc", basis="independent", density=0.07)
    accelerated.export_to_peft(model, tmp_path)
    assert_close(deltas(opened_by_stock(tmp_path)), deltas(model), 1e-6)


def test_what_else_is_there_goes_along(tmp_path, x):
    """Biases, modules_to_save, and what people wrote into the card, as save_pretrained keeps it."""
    bias = "all" if PEFT >= (0, 21) else "none"  # PEFT 0.20 saves none of RandLoRA
    model = made(base=Headed, density=0.3, modules_to_save=["head"], bias=bias)
    shake(model)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Our adapter\n")
    accelerated.export_to_peft(model, tmp_path)
    assert relative(opened_by_stock(tmp_path, Headed)(x), model(x)) < 1e-6
    card = (tmp_path / "README.md").read_text()
    assert "# Our adapter" in card and "license: mit" in card and "library_name: peft" in card


def test_a_stock_model_and_no_peft_model(tmp_path, x):
    stock = stock_made(sparse=True)
    accelerated.export_to_peft(stock, tmp_path)
    assert torch.equal(opened_by_stock(tmp_path)(x), stock(x))
    with pytest.raises(TypeError, match="must be a PeftModel with RandLoRA .*, got .*Deep"):
        accelerated.export_to_peft(Deep(), tmp_path)
