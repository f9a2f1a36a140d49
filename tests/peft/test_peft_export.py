"""What others open: export_to_peft, PEFT's conversion to LoRA, model cards."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from language_models import llama
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
    peft,
    randomize,
    relative,
    shake,
    stock_made,
)
from safetensors.torch import load_file
from torch import nn

import randlora_ext

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, of fan_in_fan_out and tied weights
EXPORTED = KINDS | {
    "generated": {"basis": "independent", "density": 0.07, "projection_prng_key": 2**64 - 1},
    "hadamard": {"basis": "hadamard", "r": 30},  # larger than a layer
}


def opened_by_stock(folder, base=Deep, **options):
    accelerated.disable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Found missing adapter keys .*randlora_A")
        model = opened(folder, base, **options)
    assert {type(layer) for layer in layers(model)} == {StockLinear}
    return model


@pytest.mark.parametrize("kind", EXPORTED.values(), ids=EXPORTED)
def test_stock_opens_the_adapter(tmp_path, kind, x):
    model = made(**kind)
    accelerated.export_to_peft(model, tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not {"density", "basis"} & set(fields)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    bases = [key for key in saved if key.endswith(("randlora_A", "randlora_B"))]
    assert bases == ["base_model.randlora_A", "base_model.randlora_B"]  # once
    own = [key for key in saved if not key.startswith("base_model.model.")]
    diagonals = [key for key in saved if key.endswith(("randlora_lambda", "randlora_gamma"))]
    assert sorted(saved) == sorted([*own, *diagonals])  # and nothing that stock PEFT lacks
    for low_cpu_mem_usage in (True, False):
        loaded = opened_by_stock(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert relative(loaded(x), model(x)) < 1e-6
    accelerated.enable()
    assert relative(opened(tmp_path)(x), model(x)) < 1e-6


def test_hadamard_bases_of_one_size_among_others(tmp_path, x):
    """D of several sizes; one basis cannot serve two sizes of which neither is the larger."""
    model = adapted(Wide(), ["a", "b", "wide", "other"], 7, basis="hadamard")
    accelerated.export_to_peft(model, tmp_path / "one")
    assert relative(opened_by_stock(tmp_path / "one", Wide)(x), model(x)) < 1e-6
    sizes = (24, 40), (40, 24), (24, 20)
    model = adapted(nn.Sequential(*(nn.Linear(*each) for each in sizes)), "012", basis="hadamard")
    message = r"min\(in, out\), which differs .*: \{20: '.*2', 24: '.*0'\}\); merge instead"
    with pytest.raises(ValueError, match=message):
        accelerated.export_to_peft(model, tmp_path / "two")
    assert not (tmp_path / "two").exists()


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


def test_biases_and_modules_to_save_go_along(tmp_path, x):
    bias = "all" if PEFT >= (0, 21) else "none"  # PEFT 0.20 saves none of RandLoRA
    model = made(base=Headed, density=0.3, modules_to_save=["head"], bias=bias)
    shake(model)
    accelerated.export_to_peft(model, tmp_path)
    assert relative(opened_by_stock(tmp_path, Headed)(x), model(x)) < 1e-6


def test_a_stock_model_and_no_peft_model(tmp_path, x):
    stock = stock_made(sparse=True)
    accelerated.export_to_peft(stock, tmp_path)
    assert torch.equal(opened_by_stock(tmp_path)(x), stock(x))
    with pytest.raises(TypeError, match="must be a PeftModel with RandLoRA .*, got .*Deep"):
        accelerated.export_to_peft(Deep(), tmp_path)


# ---- as LoRA, and model cards


def same(model, other, tolerance=0):
    tokens = torch.arange(6)[None]
    assert relative(model(tokens).logits, other(tokens).logits) <= tolerance


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_full_rank_nothing_is_lost(tmp_path, kind, dtype, x):
    def base():
        return Deep().to(dtype)

    model = adapted(base(), "abc", 5, **kind)
    peft.save_as_lora(tmp_path, model, rank=24)
    lora = opened(tmp_path, base).eval()
    assert isinstance(lora.base_model, peft.tuners.lora.LoraModel)
    with torch.no_grad():
        y, want = lora(x.to(dtype)), model(x.to(dtype))
    assert relative(y, want) < (5e-6 if dtype == torch.float32 else 0.02)


@pytest.fixture
def model(tmp_path, monkeypatch):
    """The present folder is a new one."""
    monkeypatch.chdir(tmp_path)
    return adapted(llama(), TARGETS, 4, basis="independent").eval()


def run_snippet(folder):
    """(card, its snippet, the model that this makes)"""
    card = ModelCard.load(folder / "README.md")
    (source,) = re.findall(r"```python\n(.*?)```", card.text, re.S)
    namespace = {"base": llama(), "folder": folder}
    exec(source, namespace)
    return card, source, namespace["model"].eval()


def test_the_snippet_opens_what_was_saved(model, tmp_path):
    (tmp_path / "adapter").mkdir()
    model.save_pretrained("adapter", is_main_process=False)
    model.save_pretrained("adapter", True, None, "auto", False)
    assert not (tmp_path / "adapter" / "README.md").exists()  # others write no card
    randomize(model).save_pretrained("adapter")
    accelerated.disable()
    card, _, loaded = run_snippet(tmp_path / "adapter")
    same(loaded, model)
    assert card.data.library_name == "peft"  # PEFT's own part
    assert "Only `randlora-ext`" in card.text


def test_the_card_says_whether_adapters_are_calibrated(tmp_path, monkeypatch):
    """In a line of its own, which a later save replaces."""
    monkeypatch.chdir(tmp_path)
    model = adapted(llama(), TARGETS, 4, basis="hadamard").eval()
    said = "Calibrated by `randlora_ext.calibrate`: "

    def told() -> list[str]:
        return re.findall(f"^{said}(.*)$", Path("adapter/README.md").read_text(), re.M)

    model.save_pretrained("adapter")
    assert told() == ["no."]
    randlora_ext.calibrate(randomize(model, size=0), [{"input_ids": torch.arange(9)[None]}])
    model.save_pretrained("adapter")
    assert told() == ["yes."]
    model.add_adapter("two", config(4, accelerated.RandLoraConfig, TARGETS, basis="hadamard"))
    model.save_pretrained("adapter")
    assert told() == ["default yes, two no."]
    adapted(llama(), TARGETS, 4, basis="independent").save_pretrained("adapter")
    assert told() == []


def test_what_stock_peft_opens_has_its_card(model, tmp_path):
    model.save_pretrained("adapter")
    accelerated.export_to_peft(model, "adapter")  # over the card that names us
    adapted(llama(), TARGETS, 4, sparse=True).save_pretrained("stock")
    for folder in ("adapter", "stock"):
        text = (tmp_path / folder / "README.md").read_text()
        assert "randlora_ext" not in text
        assert "# Model Card for Model ID" in text and "opens with" not in text


def test_what_others_wrote_stays(model, tmp_path):
    model.save_pretrained("adapter")
    file = tmp_path / "adapter" / "README.md"
    mine = file.read_text().replace("# Model Card for Model ID", "# Mine")
    file.write_text(mine)
    model.save_pretrained("adapter")
    assert file.read_text() == mine
    file.write_text("---\nlicense: mit\n---\n# Mine alone\n")
    model.save_pretrained("adapter")
    card, _, loaded = run_snippet(tmp_path / "adapter")
    assert card.data.license == "mit" and "\n# Mine alone\n" in card.text
    same(loaded, model)
