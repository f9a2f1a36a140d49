"""Folders of `save_adapter` on the command line, which needs no PEFT for them."""

import json
import subprocess
import sys

import pytest
import torch
from cli_helpers import TARGETS, gpt2, llama, refused, run
from cli_helpers import save_adapter as save_adapter_of_peft
from peft_helpers import randomize, relative
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from randlora_ext import apply_randlora, merge_and_unload, save_adapter

pytestmark = pytest.mark.usefixtures("stock_peft")
OPTIONS = {"r": 5, "randlora_alpha": 100, "density": 0.3, "seed": 9, "basis": "independent"}
TOKENS = torch.arange(12).view(2, 6)


def adapted(base, targets, folder, **options):
    """`base` with an adapter, which `folder` has too."""
    model = randomize(apply_randlora(base, targets, **(OPTIONS | options)))
    save_adapter(model, folder)
    return model


def logits_of(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.parametrize("kind", [{}, {"basis": "hadamard", "density": None}], ids=str)
def test_merge_without_peft(sound, tmp_path, kind):
    adapter = tmp_path / "adapter"
    want = logits_of(adapted(llama(), TARGETS, adapter, **kind))
    program = "import sys; sys.modules['peft'] = None; import randlora_cli; randlora_cli.main()"
    arguments = ("merge", sound / "model", adapter, tmp_path / "out")
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


def test_a_second_time_is_refused(sound, tmp_path):
    """The folder says what was merged, wherever the adapter lies meanwhile."""
    one, two = tmp_path / "one", tmp_path / "two"
    adapted(llama(), TARGETS, one)
    adapted(llama(), TARGETS, two, seed=10)
    once, both, again = (tmp_path / name for name in ("once", "both", "again"))
    for model, adapter, out in ((sound / "model", one, once), (once, two, both)):
        assert run("merge", model, adapter, out)[0] == 0
    listed = json.loads((both / "randlora_merged.json").read_text())["merged"]
    assert [each["adapter"] for each in listed] == [str(one), str(two)]
    one.rename(moved := tmp_path / "moved")
    for model in (once, both):
        told = refused("merge", model, moved, again)
        assert f"{model} holds {moved} already, which was merged from {one}: twice would" in told
    # The same numbers of another scaling or seed are another adapter.
    adapted(llama(), TARGETS, tmp_path / "other", randlora_alpha=50)
    assert run("merge", once, tmp_path / "other", again)[0] == 0
    for text in ("[]", '{"merged": 3}', '{"merged": [3]}', '{"merged": [{}]}', "{"):
        (once / "randlora_merged.json").write_text(text)
        assert f"{once}/randlora_merged.json: " in refused("merge", once, two, tmp_path / "no")


def test_tied_layers(tmp_path):
    """Of a bare model, whose layers have a longer name in the files."""
    net = nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in "ab"})
    net["c"] = net["a"]
    before = {f"model.{name}.weight": net[name].weight.detach().clone() for name in "abc"}
    (tmp_path / "model").mkdir()
    save_file(before, tmp_path / "model" / "model.safetensors")
    adapted(net, [*"abc"], tmp_path / "a")
    merging = ("merge", tmp_path / "model", tmp_path / "a", tmp_path / "out")
    assert run(*merging)[0] == 0
    after = load_file(tmp_path / "out" / "model.safetensors")
    merge_and_unload(net)
    for name in "abc":
        torch.testing.assert_close(after[f"model.{name}.weight"], net[name].weight)
    del before["model.c.weight"]
    save_file(before, tmp_path / "model" / "model.safetensors")
    assert "that weight is tied to another" in refused(*merging[:3], tmp_path / "other")


def test_what_does_not_fit_is_told(sound, tmp_path, monkeypatch):
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    adapted(llama(), TARGETS, adapter)
    llama(intermediate_size=64).save_pretrained(tmp_path / "other")
    monkeypatch.setitem(sys.modules, "peft", None)
    wide = "down_proj is of in_features and out_features (48, 32), and must be of (64, 32)"
    for model, source, told in (
        (tmp_path / "other", adapter, wide),
        ("HUB/NAME", adapter, "MODEL HUB/NAME does not exist here; of the hub's, `hf download NAM"),
        ("nowhere", "nor here", "MODEL nowhere does not exist here"),
        (sound / "model", "HUB/NAME", "ADAPTER HUB/NAME does not exist here; of the hub's, `hf"),
        (sound / "model", tmp_path, "adapter_config.json"),
        (sound / "model", adapter / "adapter_config.json", "is a file; an adapter is a folder"),
    ):
        assert told in refused("merge", model, source, out)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    assert f"{weights} is damaged" in refused("merge", sound / "model", adapter, out)


def test_bases_of_peft_need_peft(whole, monkeypatch):
    """The one line says how to get it."""
    save_adapter_of_peft(llama(), whole / "adapter")
    monkeypatch.setitem(sys.modules, "peft", None)
    told = refused("merge", whole / "model", whole / "adapter", whole / "out")
    assert 'pip install "randlora-ext[peft]" brings what is needed' in told
