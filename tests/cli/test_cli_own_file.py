"""Files of `save_adapter` on the command line."""

import subprocess
import sys

import pytest
import torch
from cli_helpers import TARGETS, gpt2, llama, refused, run
from peft_helpers import randomize, relative
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from randlora_ext import apply_randlora, merge_and_unload, save_adapter

pytestmark = pytest.mark.usefixtures("stock_peft")
OPTIONS = {"r": 5, "randlora_alpha": 100, "density": 0.3, "seed": 9, "basis": "independent"}
TOKENS = torch.arange(12).view(2, 6)


def adapted(base, targets, file, **options):
    """`base` with an adapter, which `file` has too."""
    model = randomize(apply_randlora(base, targets, **(OPTIONS | options)))
    save_adapter(model, file)
    return model


def logits_of(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.parametrize("kind", [{}, {"basis": "hadamard", "density": None}], ids=str)
def test_merge_without_peft(sound, tmp_path, kind):
    file = tmp_path / "a.safetensors"
    want = logits_of(adapted(llama(), TARGETS, file, **kind))
    program = "import sys; sys.modules['peft'] = None; import randlora_cli; randlora_cli.main()"
    arguments = ("merge", sound / "model", file, tmp_path / "out")
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True)
    assert done.returncode == 0, done.stderr
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert relative(logits_of(llama()), want) > 0.01
    assert relative(logits_of(merged), want) < 1e-5


def test_merge_of_square_conv1d(tmp_path):
    """Whose weight is (in, out), which a square one's shape does not tell."""
    base = gpt2(tmp_path / "base")
    model = adapted(base, ["c_proj"], tmp_path / "a", modules_to_save=["ln_f"])
    nn.init.normal_(model.transformer.ln_f.weight)
    save_adapter(model, tmp_path / "a")
    assert run("merge", tmp_path / "base", tmp_path / "a", tmp_path / "out")[0] == 0
    got = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in merge_and_unload(model).state_dict().items():
        if name.endswith(("c_proj.weight", "ln_f.weight")):
            torch.testing.assert_close(got[name], weight, rtol=1e-5, atol=1e-5)


def test_tied_layers(tmp_path):
    """Of a bare model, whose layers have a longer name in the files."""
    net = nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in "ab"})
    net["c"] = net["a"]
    before = {f"model.{name}.weight": net[name].weight.detach().clone() for name in "abc"}
    (tmp_path / "model").mkdir()
    save_file(before, tmp_path / "model" / "model.safetensors")
    adapted(net, [*"abc"], tmp_path / "a.safetensors")
    merging = ("merge", tmp_path / "model", tmp_path / "a.safetensors", tmp_path / "out")
    assert run(*merging)[0] == 0
    after = load_file(tmp_path / "out" / "model.safetensors")
    merge_and_unload(net)
    for name in "abc":
        torch.testing.assert_close(after[f"model.{name}.weight"], net[name].weight)
    del before["model.c.weight"]
    save_file(before, tmp_path / "model" / "model.safetensors")
    assert "that weight is tied to another" in refused(*merging[:3], tmp_path / "other")


def test_what_does_not_fit_is_told(sound, tmp_path, monkeypatch):
    file, out = tmp_path / "a.safetensors", tmp_path / "out"
    adapted(llama(), TARGETS, file)
    llama(intermediate_size=64).save_pretrained(tmp_path / "other")
    # Paths are checked first: nobody waits for PEFT to be told of a misspelt one.
    monkeypatch.setitem(sys.modules, "randlora_ext.peft", None)
    for model, adapter, told in (
        (tmp_path / "other", file, "in_features and out_features are (32, 64), not (32, 48)"),
        ("HUB/NAME", file, "MODEL HUB/NAME does not exist here; of the hub's, `hf download NAME"),
        ("nowhere", "nor here", "MODEL nowhere does not exist here"),
        (sound / "model", "HUB/NAME", "ADAPTER HUB/NAME does not exist here; of the hub's, `hf"),
        (sound / "model", tmp_path, "adapter_config.json"),
    ):
        assert told in refused("merge", model, adapter, out)
    file.write_bytes(file.read_bytes()[:-3])
    assert "damaged" in refused("merge", sound / "model", file, out)
