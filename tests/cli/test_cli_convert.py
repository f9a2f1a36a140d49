"""``randlora convert``: both directions, against PEFT's own loading."""

import json

import pytest
import torch
from cli_helpers import KINDS, Q0, TARGETS, llama, refused, run, save_adapter, with_adapter
from peft_helpers import accelerated, edit_config, layers, peft, randomize, relative
from safetensors.torch import load_file, save_file

from randlora_ext import apply_randlora
from randlora_ext import save_adapter as save_own_adapter

pytestmark = [
    pytest.mark.usefixtures("one_thread", "stock_peft"),
    pytest.mark.filterwarnings(
        "ignore:Specified to not save", "ignore:RandLoRA layers of this", "ignore:Found missing"
    ),
]
TOKENS = torch.arange(12).view(2, 6)
SIZES_32 = ["q_proj", "up_proj", "down_proj"]  # whose min(in, out) is 32; of v_proj it is 16


def logits(folder, ours, dtype=torch.float32):
    accelerated.enable() if ours else accelerated.disable()
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(llama().to(dtype), folder).eval()(TOKENS).logits


def has_bases(folder):
    return any("randlora_A" in key for key in load_file(folder / "adapter_model.safetensors"))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_to_peft_and_back(tmp_path, base_folder, kind):
    hadamard = kind.get("basis") == "hadamard"
    targets = SIZES_32 if hadamard else TARGETS
    model = save_adapter(llama(), tmp_path / "a", targets=targets, **kind)
    with torch.no_grad():
        want = model(TOKENS).logits
        assert relative(want, llama()(TOKENS).logits) > 0.01
    base = ("--base", base_folder)
    code, out, _ = run("convert", tmp_path / "a", tmp_path / "peft", "--to", "peft", *base)
    assert code == 0 and "stock PEFT opens it" in out and has_bases(tmp_path / "peft")
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert not {"density", "basis"} & set(settings)
    assert settings["target_modules"] and settings["save_projection"]
    for ours in (False, True):
        assert relative(logits(tmp_path / "peft", ours), want) < 1e-5

    # The configuration of stock PEFT cannot say a density.
    share = ("--density", kind["density"]) if "density" in kind else ()
    code, out, _ = run("convert", tmp_path / "peft", tmp_path / "small", "--to", "compact", *share)
    assert code == 0 and not has_bases(tmp_path / "small")
    # PEFT's config cannot say a density, not even of PEFT's own draw.
    stock = "density" not in kind and "basis" not in kind
    assert ("stock PEFT and" in out) == stock
    assert relative(logits(tmp_path / "small", True), want) < 1e-5
    if stock:
        assert relative(logits(tmp_path / "small", False), want) < 1e-5


def test_a_compact_adapter_of_hadamard_bases_has_only_the_seed(tmp_path, base_folder):
    save_adapter(llama(), tmp_path / "a", targets=SIZES_32, **KINDS["hadamard"])
    convert = ("convert", tmp_path / "a", tmp_path / "peft", "--to", "peft")
    assert run(*convert, "--base", base_folder)[0] == 0
    code, out, _ = run("convert", tmp_path / "peft", tmp_path / "small", "--to", "compact")
    assert code == 0 and "randlora_ext.peft opens it" in out
    settings = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert settings["projection_prng_key"] == "randlora_ext:hadamard-1:seed=7"


def test_hadamard_bases_of_two_sizes_have_no_dense_form(tmp_path, base_folder):
    save_adapter(llama(), tmp_path / "a", **KINDS["hadamard"])
    convert = ("convert", tmp_path / "a", tmp_path / "peft", "--to", "peft")
    line = refused(*convert, "--base", base_folder)
    assert "_proj' has " in line and "v_proj' 32 -> 16;" in line
    assert "merge instead" in line and not (tmp_path / "peft").exists()


def test_density_that_cannot_be_read_off_is_given(tmp_path, base_folder):
    kind = {"basis": "independent", "density": 0.123456789}
    save_adapter(llama(), tmp_path / "a", **kind)
    run("convert", tmp_path / "a", tmp_path / "peft", "--to", "peft", "--base", base_folder)
    convert = ("convert", tmp_path / "peft", tmp_path / "small", "--to", "compact")
    assert "not those of projection_prng_key 0" in refused(*convert)
    assert "density" in refused(*convert, "--density", 0.2)
    assert "density" in refused(*convert, "--density", 3)
    assert run(*convert, "--density", 0.123456789)[0] == 0
    settings = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert settings["basis"] == "independent" and settings["density"] == 0.123456789


def test_bases_of_another_key_stay(tmp_path, base_folder):
    save_adapter(llama(), tmp_path / "a", sparse=True)
    edit_config(tmp_path / "a", projection_prng_key=5)
    line = refused("convert", tmp_path / "a", tmp_path / "b", "--to", "compact")
    assert "projection_prng_key 5" in line and not (tmp_path / "b").exists()


def test_bases_of_a_bf16_model(tmp_path):
    accelerated.enable()
    model = save_adapter(llama().bfloat16(), tmp_path / "a", sparse=True)
    code, *_ = run("convert", tmp_path / "a", tmp_path / "small", "--to", "compact")
    assert code == 0 and not has_bases(tmp_path / "small")
    with torch.no_grad():
        want = model(TOKENS).logits
    assert relative(logits(tmp_path / "small", True, torch.bfloat16), want) < 1e-2
    # The saved bases are rounded and those that are drawn again are not; dW is the same.
    small = peft.PeftModel.from_pretrained(llama().bfloat16(), tmp_path / "small")
    for ours, theirs in zip(layers(small), layers(model), strict=True):
        delta, want = (layer.get_delta_weight("default") for layer in (ours, theirs))
        assert relative(delta, want) < 1e-6


def test_other_tensors_and_files_go_along(tmp_path, base_folder):
    kind = {"basis": "independent", "modules_to_save": ["lm_head"]}
    model = with_adapter(llama(), **kind)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.normal_()
        want = model(TOKENS).logits
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("card")
    base = ("--base", base_folder)
    assert run("convert", tmp_path / "a", tmp_path / "b", "--to", "peft", *base)[0] == 0
    assert "\ncard\n" in (tmp_path / "b" / "README.md").read_text()
    assert relative(logits(tmp_path / "b", False), want) < 1e-5


def test_the_copies_of_stock_peft_are_dropped(tmp_path):
    config = peft.RandLoraConfig(r=5, target_modules=["q_proj", "up_proj"], very_sparse=True)
    model = randomize(peft.get_peft_model(llama(), config)).eval()
    model.save_pretrained(tmp_path / "a")
    assert len(layers(model)) == 4
    code, out, _ = run("convert", tmp_path / "a", tmp_path / "once", "--to", "peft")
    assert code == 0  # the bases are there, so no base model is needed
    once, copies = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("once", "a"))
    assert len(copies) == len(once) + 8
    assert run("convert", tmp_path / "a", tmp_path / "small", "--to", "compact")[0] == 0
    with torch.no_grad():
        want = model(TOKENS).logits
    for name in ("once", "small"):
        assert relative(logits(tmp_path / name, False), want) < 1e-6


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_to_lora(tmp_path, base_folder, kind):
    """Of the full rank, so nothing is lost; test_peft_lora.py has the truncation."""
    model = save_adapter(llama(), tmp_path / "a", **kind)
    with torch.no_grad():
        want = model(TOKENS).logits
    convert = ("convert", tmp_path / "a", tmp_path / "lora", "--to", "lora", "--rank", 32)
    code, out, _ = run(*convert, "--base", base_folder)
    assert code == 0 and "rank 32 keeps 1.0000 of |dW|^2" in out
    assert len(out.splitlines()) == 9 and f"{Q0} " in out
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert sorted(settings["target_modules"]) == sorted(TARGETS)
    assert (settings["r"], settings["lora_alpha"]) == (32, 32)
    assert relative(logits(tmp_path / "lora", False), want) < 1e-5


def test_to_lora_by_energy(tmp_path, base_folder):
    kind = {"modules_to_save": ["lm_head"], "layers_to_transform": [1], "sparse": True}
    model = save_adapter(llama(), tmp_path / "a", **kind)
    convert = ("convert", tmp_path / "a", tmp_path / "lora", "--to", "lora", "--base", base_folder)
    assert "either --rank or --energy" in refused(*convert)
    assert "energy must be in (0, 1], got 2.0" in refused(*convert, "--energy", 2)
    assert "rank must be a positive integer, got -1" in refused(*convert, "--rank", -1)
    to_peft = ("convert", tmp_path / "a", tmp_path / "lora", "--to", "peft", "--rank", 1)
    assert "go with --to lora" in refused(*to_peft)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    code, out, _ = run(*convert, "--energy", 1)
    assert code == 0 and "rank 32 keeps 1.0000" in out and "vLLM refuses it" in out
    with torch.no_grad():
        assert relative(logits(tmp_path / "lora", False), model(TOKENS).logits) < 1e-5


def test_what_cannot_be_done_is_told(tmp_path, base_folder):
    save_adapter(llama(), tmp_path / "a", basis="independent")
    convert = ("convert", tmp_path / "a", tmp_path / "b")
    assert "compact already" in refused(*convert, "--to", "compact")
    assert "--base" in refused(*convert, "--to", "peft")
    assert "--to" in refused(*convert)
    (tmp_path / "b").write_text("mine")
    assert "exists" in refused(*convert, "--to", "peft", "--base", base_folder)
    assert (tmp_path / "b").read_text() == "mine"
    (tmp_path / "b").unlink()
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({"base_model.randlora_A": torch.zeros(5, 1, 32)} | load_file(file), file)
    assert "alone" in refused(*convert, "--to", "compact")
    save_file(load_file(file) | {"base_model.randlora_B": torch.zeros(2, 2, 2)}, file)
    for to in ("peft", "compact"):
        assert "too small" in refused(*convert, "--to", to)
        assert not (tmp_path / "b").exists()


def test_broken_adapters_and_models_are_told(tmp_path, base_folder):
    def line(source, *base):
        return refused("convert", source, tmp_path / "out", "--to", "lora", "--rank", 4, *base)

    save_adapter(llama(hidden_size=64), tmp_path / "a", basis="independent")
    assert "min(in, out)" in line(tmp_path / "a", "--base", base_folder)
    assert "neither a folder" in line(tmp_path / "a", "--base", "no/such-model")
    (tmp_path / "base").mkdir()
    assert "neither model" in line(tmp_path / "a", "--base", tmp_path / "base")
    (tmp_path / "file").write_text("")
    assert "damaged" in line(tmp_path / "file")
    assert "adapter_config.json" in line(tmp_path / "nowhere")
    assert "File name too long" in line("x" * 5000)
    assert not (tmp_path / "out").exists()


def test_bases_that_only_a_layer_holds_are_found(tmp_path, base_folder):
    """transformers writes them there alone."""
    config = peft.RandLoraConfig(r=5, target_modules=["q_proj", "up_proj"], sparse=True)
    model = randomize(peft.get_peft_model(llama(), config)).eval()
    model.save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    saved = load_file(file)
    bases = [key for key in saved if key.endswith(("randlora_A", "randlora_B"))]
    assert len(bases) == 2 * 5
    save_file({k: v for k, v in saved.items() if k not in bases or Q0 in k}, file)
    assert run("convert", tmp_path / "a", tmp_path / "once", "--to", "peft")[0] == 0
    with torch.no_grad():
        assert relative(logits(tmp_path / "once", False), model(TOKENS).logits) < 1e-6


def test_tied_layers_are_refused(tmp_path):
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(8, 8), "b": torch.nn.Linear(8, 8)})
    model["c"] = model["a"]
    apply_randlora(model, ["a", "b", "c"], r=2)
    save_own_adapter(model, tmp_path / "a.safetensors")
    for options in (("--to", "peft"), ("--to", "lora", "--rank", 2)):
        said = refused("convert", tmp_path / "a.safetensors", tmp_path / "o", *options)
        assert "a is also c" in said and not (tmp_path / "o").exists()
