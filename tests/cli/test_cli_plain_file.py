"""Files of `save_adapter` on the command line."""

import subprocess
import sys

import pytest
import torch
from cli_helpers import TARGETS, gpt2, llama, refused, run
from peft_helpers import accelerated, opened, relative
from safetensors.torch import load_file

from randlora_ext import RandLoraLinear, apply_randlora, merge_and_unload, save_adapter

pytestmark = pytest.mark.usefixtures("one_thread", "stock_peft")
OPTIONS = {"r": 5, "randlora_alpha": 100, "density": 0.3, "projection_prng_key": 9}
TOKENS = torch.arange(12).view(2, 6)


def adapted(base, targets, file, **options):
    """`base` with an adapter, which `file` has too."""
    model = apply_randlora(base, targets, **(OPTIONS | options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in (m for m in model.modules() if isinstance(m, RandLoraLinear)):
            layer.randlora_lambda["default"].normal_(0, 0.01, generator=generator)
    save_adapter(model, file)
    return model.eval()


@pytest.fixture
def saved(tmp_path):
    """(model, file, folder of the base model)."""
    llama().save_pretrained(tmp_path / "base")
    file = tmp_path / "a.safetensors"
    return adapted(llama(), TARGETS, file), file, tmp_path / "base"


def test_merge_without_peft(saved, tmp_path):
    from transformers import AutoModelForCausalLM

    model, file, base = saved
    program = "import sys; sys.modules['peft'] = None; import randlora_cli; randlora_cli.main()"
    arguments = ("merge", base, file, tmp_path / "out")
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True)
    assert done.returncode == 0, done.stderr
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        want = model(TOKENS).logits
        assert relative(llama()(TOKENS).logits, want) > 0.01
        assert relative(merged(TOKENS).logits, want) < 1e-5


@pytest.mark.parametrize("seed", [None, 3])
def test_merge_of_square_conv1d(tmp_path, seed):
    """Whose weight is (in, out), which a square one's shape does not tell."""
    base = gpt2(tmp_path / "base").to(torch.bfloat16 if seed else torch.float32)
    base.save_pretrained(tmp_path / "base")
    model = adapted(base, ["c_proj"], tmp_path / "a.safetensors")
    rounding = ("--rounding-seed", seed) if seed else ()
    out = tmp_path / "out"
    assert run("merge", tmp_path / "base", tmp_path / "a.safetensors", out, *rounding)[0] == 0
    got = load_file(out / "model.safetensors")
    for name, weight in merge_and_unload(model).state_dict().items():
        if name.endswith("c_proj.weight"):
            ulp = 2**-7 if seed else 1e-5
            torch.testing.assert_close(got[name], weight, rtol=ulp, atol=1e-5)


def test_hadamard_bases(tmp_path):
    options = {"basis": "hadamard", "density": None}
    file, base = tmp_path / "a.safetensors", tmp_path / "base"
    llama().save_pretrained(base)
    model = adapted(llama(), TARGETS, file, **options)
    assert run("merge", base, file, tmp_path / "merged")[0] == 0
    assert run("convert", file, tmp_path / "small", "--to", "compact")[0] == 0
    line = refused("convert", file, tmp_path / "peft", "--to", "peft")
    assert "32 -> 16" in line and "merge instead" in line
    accelerated.enable()
    loaded = opened(tmp_path / "small", llama).eval()
    merged = type(llama()).from_pretrained(tmp_path / "merged").eval()
    assert run("convert", file, tmp_path / "lora", "--to", "lora", "--rank", 32)[0] == 0
    lora = opened(tmp_path / "lora", llama).eval()
    with torch.no_grad():
        want = model(TOKENS).logits
        for other in (loaded, merged, lora):
            assert relative(other(TOKENS).logits, want) < 1e-5


def test_conv1d_to_lora(tmp_path):
    """Of layers with different options, and square ones whose weight is (in, out)."""
    base = gpt2(tmp_path / "base", tie_word_embeddings=False)
    apply_randlora(base, ["c_proj"], r=5)
    model = adapted(base, ["lm_head"], tmp_path / "a")
    convert = ("convert", tmp_path / "a", tmp_path / "lora", "--to", "lora", "--rank", 32)
    assert run(*convert, "--base", tmp_path / "base")[0] == 0
    plain = type(base).from_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match="fan_in_fan_out"):  # PEFT's, of lm_head
        lora = opened(tmp_path / "lora", lambda: plain).eval()
    with torch.no_grad():
        assert relative(lora(TOKENS).logits, model(TOKENS).logits) < 1e-5


@pytest.mark.parametrize("to", ["peft", "compact"])
def test_convert_to_a_folder_of_peft(saved, tmp_path, to):
    model, file, _ = saved
    assert run("convert", file, tmp_path / "out", "--to", to)[0] == 0
    accelerated.disable() if to == "peft" else accelerated.enable()
    loaded = opened(tmp_path / "out", llama).eval()
    with torch.no_grad():
        assert relative(loaded(TOKENS).logits, model(TOKENS).logits) < 1e-5


def test_what_does_not_fit_is_told(saved, tmp_path):
    _, file, base = saved
    model = llama(intermediate_size=64)
    model.save_pretrained(tmp_path / "other")
    line = refused("merge", tmp_path / "other", file, tmp_path / "out")
    assert "up_proj: in_features and out_features are (32, 64), in the file (32, 48)" in line
    apply_randlora(model, ["q_proj"], r=4)
    apply_randlora(model, ["v_proj"], r=8)
    save_adapter(model, tmp_path / "two")
    convert = ("convert", tmp_path / "two", tmp_path / "out", "--to", "peft")
    assert "layers of different options" in refused(*convert)
    file.write_bytes(file.read_bytes()[:-3])
    assert "damaged" in refused("convert", file, tmp_path / "out", "--to", "compact")
