"""Adapters of `apply_randlora`, saved as one safetensors file, on the command line."""

import json

import pytest
import torch
from cli_helpers import TARGETS, llama, refused, run
from peft_helpers import accelerated, peft, relative
from safetensors.torch import load_file, save_file

from randlora_ext import RandLoraLinear, apply_randlora

pytestmark = pytest.mark.usefixtures("one_thread", "stock_peft")
OPTIONS = {"r": 5, "randlora_alpha": 100, "density": 0.3, "projection_prng_key": 9}
TOKENS = torch.arange(12).view(2, 6)


@pytest.fixture
def saved(tmp_path):
    """(model, file, folder of the base model)."""
    llama().save_pretrained(tmp_path / "base")
    model = apply_randlora(llama(), TARGETS, **OPTIONS)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in (m for m in model.modules() if isinstance(m, RandLoraLinear)):
            layer.randlora_lambda["default"].normal_(0, 0.01, generator=generator)
    state = {n: p.detach() for n, p in model.named_parameters() if "randlora_" in n}
    save_file(state, tmp_path / "a.safetensors", metadata={"randlora": json.dumps(OPTIONS)})
    return model.eval(), tmp_path / "a.safetensors", tmp_path / "base"


def test_inspect(saved):
    model, file, base = saved
    code, out, _ = run("--inspect", file, "--base", base)
    assert code == 0 and "8 layers" in out and "density=0.3" in out
    row = next(line for line in out.splitlines() if "layers.0.self_attn.q_proj" in line).split()
    delta = model.model.layers[0].self_attn.q_proj.get_delta_weight("default")
    assert float(row[-3]) == pytest.approx(float(delta.detach().norm()), rel=1e-3)


def test_merge(saved, tmp_path):
    from transformers import AutoModelForCausalLM

    model, file, base = saved
    assert run("--merge", base, file, tmp_path / "out")[0] == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        want = model(TOKENS).logits
        assert relative(llama()(TOKENS).logits, want) > 0.01
        assert relative(merged(TOKENS).logits, want) < 1e-5


@pytest.mark.parametrize("to", ["peft", "compact"])
def test_convert_to_a_folder_of_peft(saved, tmp_path, to):
    model, file, base = saved
    options = ("--base", base) if to == "peft" else ()
    assert run("--convert", file, tmp_path / "out", "--to", to, *options)[0] == 0
    accelerated.disable() if to == "peft" else accelerated.enable()
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "out").eval()
    with torch.no_grad():
        assert relative(loaded(TOKENS).logits, model(TOKENS).logits) < 1e-5


def test_what_a_file_must_tell(saved, tmp_path):
    _, file, base = saved
    state = load_file(file)
    inspect = ("--inspect", file, "--base", base)

    def write(tensors, options):
        save_file(tensors, file, metadata={} if options is None else {"randlora": options})

    write(state, None)
    assert "does not tell its bases" in refused(*inspect)
    write(state, "{")
    assert "does not tell its bases" in refused(*inspect)
    write(state, "[1]")
    assert "must be" in refused(*inspect)
    write(state, json.dumps({**OPTIONS, "extra": 1}))
    assert "extra" in refused(*inspect)
    for wrong in ({"density": 2}, {"r": 0}, {"r": "5"}, {"randlora_alpha": None},
                  {"projection_prng_key": -1}, {"r": 7}):  # fmt: skip
        write(state, json.dumps(OPTIONS | wrong))
        assert next(iter(wrong)) in refused(*inspect)
    good = json.dumps(OPTIONS)
    write({"weight": torch.zeros(2)}, good)
    assert "one adapter" in refused(*inspect)
    write(state | {k.replace("default", "other"): v.clone() for k, v in state.items()}, good)
    assert "['default', 'other']" in refused(*inspect)
    write(state | {"x.randlora_A.default": torch.zeros(2)}, good)
    assert "no lambda or gamma" in refused(*inspect)
    file.write_bytes(file.read_bytes()[:-3])
    assert "damaged" in refused(*inspect)
