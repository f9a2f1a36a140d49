"""``randlora convert``: both directions, against PEFT's own loading."""

import json

import pytest
import torch
from cli_helpers import KINDS, Q0, TARGETS, llama, refused, run, save_adapter, with_adapter
from peft_helpers import accelerated, edit_config, layers, opened, peft, randomize, relative
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


@pytest.fixture
def convert(tmp_path, sound):
    """Converts tmp_path/source to tmp_path/out, and returns what was printed."""

    def done(source, out, to, *options, base=False):
        options += ("--base", sound / "model") if base else ()
        code, said, err = run("convert", tmp_path / source, tmp_path / out, "--to", to, *options)
        assert code == 0, err
        return said

    return done


def logits(folder, ours, dtype=torch.float32):
    accelerated.enable() if ours else accelerated.disable()
    with torch.no_grad():
        return opened(folder, lambda: llama().to(dtype)).eval()(TOKENS).logits


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def has_bases(folder):
    return any("randlora_A" in key for key in tensors(folder))


def fields(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def saved(folder, base=None, **options):
    """Saves an adapter, and returns the logits of its model."""
    model = save_adapter(base or llama(), folder, **options)
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_to_peft_and_back(tmp_path, convert, kind):
    hadamard = kind.get("basis") == "hadamard"
    want = saved(tmp_path / "a", targets=SIZES_32 if hadamard else TARGETS, **kind)
    assert relative(want, llama()(TOKENS).logits) > 0.01
    said = convert("a", "peft", "peft", base=True)
    assert "stock PEFT opens it" in said and has_bases(tmp_path / "peft")
    settings = fields(tmp_path / "peft")
    assert not {"density", "basis"} & set(settings)
    assert settings["target_modules"] and settings["save_projection"]
    assert relative(logits(tmp_path / "peft", False), want) < 1e-5

    # The configuration of stock PEFT cannot say a density, not even of PEFT's own draw.
    share = ("--density", kind["density"]) if "density" in kind else ()
    said = convert("peft", "small", "compact", *share)
    assert not has_bases(tmp_path / "small")
    stock = "density" not in kind and "basis" not in kind
    assert ("stock PEFT and" in said) == stock and "randlora_ext.peft opens it" in said
    for ours in (True, False) if stock else (True,):
        assert relative(logits(tmp_path / "small", ours), want) < 1e-5


def test_density_that_cannot_be_read_off_is_given(tmp_path, convert):
    saved(tmp_path / "a", basis="independent", density=0.123456789)
    convert("a", "peft", "peft", base=True)
    compact = ("convert", tmp_path / "peft", tmp_path / "small", "--to", "compact")
    assert "not those of projection_prng_key 0" in refused(*compact)
    for wrong in (0.2, 3):
        assert "density" in refused(*compact, "--density", wrong)
    back = ("convert", tmp_path / "peft", tmp_path / "back", "--to", "peft", "--density", 0.2)
    assert "--density goes with --to compact" in refused(*back)
    convert("peft", "small", "compact", "--density", 0.123456789)
    settings = fields(tmp_path / "small")
    assert settings["basis"] == "independent" and settings["density"] == 0.123456789


def test_bases_that_stock_peft_drew_from_a_negative_seed(tmp_path):
    file = tmp_path / "a" / "adapter_model.safetensors"
    saved(tmp_path / "a", sparse=True, projection_prng_key=-1)
    bases = load_file(file)
    (key,) = (key for key in bases if key.endswith("randlora_B"))
    save_file(bases | {key: bases[key].flip(0).contiguous()}, file)
    line = refused("convert", tmp_path / "a", tmp_path / "small", "--to", "compact")
    assert "not those of projection_prng_key -1" in line


def test_bases_of_a_bf16_model(tmp_path, convert):
    model = save_adapter(llama().bfloat16(), tmp_path / "a", sparse=True)
    convert("a", "small", "compact")
    assert not has_bases(tmp_path / "small")
    with torch.no_grad():
        want = model(TOKENS).logits
    assert relative(logits(tmp_path / "small", True, torch.bfloat16), want) < 1e-2
    # The saved bases are rounded and those that are drawn again are not; dW is the same.
    small = opened(tmp_path / "small", lambda: llama().bfloat16())
    for ours, theirs in zip(layers(small), layers(model), strict=True):
        delta, want = (layer.get_delta_weight("default") for layer in (ours, theirs))
        assert relative(delta, want) < 1e-6


def test_other_tensors_and_files_go_along(tmp_path, convert):
    model = with_adapter(llama(), basis="independent", modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.normal_()
        want = model(TOKENS).logits
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("card")
    convert("a", "b", "peft", base=True)
    assert "\ncard\n" in (tmp_path / "b" / "README.md").read_text()
    assert relative(logits(tmp_path / "b", False), want) < 1e-5


@pytest.mark.parametrize("only_one_layer", [True, False])
def test_bases_under_layers(tmp_path, convert, only_one_layer):
    """Stock PEFT writes copies under every layer, transformers the bases under one alone."""
    config = peft.RandLoraConfig(r=5, target_modules=["q_proj", "up_proj"], very_sparse=True)
    model = randomize(peft.get_peft_model(llama(), config)).eval()
    model.save_pretrained(tmp_path / "a")
    copies = tensors(tmp_path / "a")
    bases = [key for key in copies if key.endswith(("randlora_A", "randlora_B"))]
    assert len(bases) == 2 * 5
    if only_one_layer:
        kept = {k: v for k, v in copies.items() if k not in bases or Q0 in k}
        save_file(kept, tmp_path / "a" / "adapter_model.safetensors")
    convert("a", "once", "peft")  # the bases are there, so no base model is needed
    assert len(tensors(tmp_path / "once")) == len(copies) - 8
    convert("a", "small", "compact")
    for name in ("once", "small"):
        assert relative(logits(tmp_path / name, False), model(TOKENS).logits) < 1e-6


def test_to_lora(tmp_path, sound, convert):
    """Of the full rank, so nothing is lost; test_peft_lora.py has the truncation."""
    kind = {"modules_to_save": ["lm_head"], "layers_to_transform": [1]}
    want = saved(tmp_path / "a", **kind)
    command = ("convert", tmp_path / "a", tmp_path / "lora", "--base", sound / "model", "--to")
    assert "either --rank or --energy" in refused(*command, "lora")
    assert "energy must be in (0, 1], got 2.0" in refused(*command, "lora", "--energy", 2)
    assert "go with --to lora" in refused(*command, "peft", "--rank", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    for name, how in (("rank", 32), ("energy", 1)):
        said = convert("a", name, "lora", f"--{name}", how, base=True)
        assert "rank 32 keeps 1.0000 of |dW|^2" in said and "vLLM refuses it" in said
        assert len(said.splitlines()) == 6 and "model.layers.1.self_attn.q_proj " in said
        settings = fields(tmp_path / name)
        assert {path.split(".")[-1] for path in settings["target_modules"]} == set(TARGETS)
        assert (settings["r"], settings["lora_alpha"]) == (32, 32)
        assert relative(logits(tmp_path / name, False), want) < 1e-5


def test_what_cannot_be_done_is_told(whole):
    convert = ("convert", whole / "adapter", whole / "b")
    assert "compact already" in refused(*convert, "--to", "compact")
    assert "--base" in refused(*convert, "--to", "peft")
    (whole / "b").write_text("mine")
    assert "exists" in refused(*convert, "--to", "peft", "--base", whole / "model")
    assert (whole / "b").read_text() == "mine"
    (whole / "b").unlink()
    file = whole / "adapter" / "adapter_model.safetensors"
    save_file({"base_model.randlora_A": torch.zeros(5, 1, 32)} | load_file(file), file)
    assert "alone" in refused(*convert, "--to", "compact")
    save_file(load_file(file) | {"base_model.randlora_B": torch.zeros(2, 2, 2)}, file)
    for to in ("peft", "compact"):
        assert "too small" in refused(*convert, "--to", to)
    save_adapter(llama(), whole / "adapter", sparse=True)
    edit_config(whole / "adapter", projection_prng_key=5)
    assert "projection_prng_key 5" in refused(*convert, "--to", "compact")
    assert not (whole / "b").exists()


def test_broken_adapters_and_models_are_told(tmp_path, sound):
    save_adapter(llama(hidden_size=64), tmp_path / "a", basis="independent")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for source, base, told in (
        ("a", sound / "model", "min(in, out)"),
        ("a", "no/such-model", "neither a folder"),
        ("a", tmp_path / "empty", "neither model"),
        ("file", sound / "model", "damaged"),
        ("nowhere", sound / "model", "adapter_config.json"),
        ("x" * 5000, sound / "model", "File name too long"),
    ):
        convert = ("convert", tmp_path / source, tmp_path / "out", "--base", base)
        assert told in refused(*convert, "--to", "lora", "--rank", 4)
    assert not (tmp_path / "out").exists()


def test_tied_layers_are_refused(tmp_path):
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(8, 8), "b": torch.nn.Linear(8, 8)})
    model["c"] = model["a"]
    apply_randlora(model, ["a", "b", "c"], r=2)
    save_own_adapter(model, tmp_path / "a.safetensors")
    for options in (("--to", "peft"), ("--to", "lora", "--rank", 2)):
        said = refused("convert", tmp_path / "a.safetensors", tmp_path / "o", *options)
        assert "a is also c" in said and not (tmp_path / "o").exists()
