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

pytestmark = pytest.mark.usefixtures("one_thread", "stock_peft")
OPTIONS = {"r": 5, "randlora_alpha": 100, "density": 0.3, "projection_prng_key": 9}
TOKENS = torch.arange(12).view(2, 6)


def adapted(base, targets, file, **options):
    """`base` with an adapter, which `file` has too."""
    model = randomize(apply_randlora(base, targets, **(OPTIONS | options)))
    save_adapter(model, file)
    return model


@pytest.fixture
def saved(tmp_path):
    """(logits, file) of a model like that of `sound` with an adapter."""
    file = tmp_path / "a.safetensors"
    return logits_of(adapted(llama(), TARGETS, file)), file


def logits_of(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def test_merge_without_peft(saved, sound, tmp_path):
    want, file = saved
    program = (
        "import runpy, sys; sys.modules['peft'] = None; "
        "runpy.run_module('randlora_ext', run_name='__main__')"
    )
    arguments = ("merge", sound / "model", file, tmp_path / "out")
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True)
    assert done.returncode == 0, done.stderr
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert relative(logits_of(llama()), want) > 0.01
    assert relative(logits_of(merged), want) < 1e-5


def test_merge_of_square_conv1d(tmp_path):
    """Whose weight is (in, out), which a square one's shape does not tell."""
    model = adapted(gpt2(tmp_path / "base"), ["c_proj"], tmp_path / "a")
    assert run("merge", tmp_path / "base", tmp_path / "a", tmp_path / "out")[0] == 0
    got = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in merge_and_unload(model).state_dict().items():
        if name.endswith("c_proj.weight"):
            torch.testing.assert_close(got[name], weight, rtol=1e-5, atol=1e-5)


def test_copies_of_tied_layers_are_merged(tmp_path):
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
        assert not torch.equal(after[f"model.{name}.weight"], before[f"model.{name}.weight"])


def test_hadamard_bases(sound, tmp_path):
    file, model = tmp_path / "a.safetensors", sound / "model"
    want = logits_of(adapted(llama(), TARGETS, file, basis="hadamard", density=None))
    assert run("merge", model, file, tmp_path / "merged")[0] == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative(logits_of(merged), want) < 1e-5


def test_what_does_not_fit_is_told(saved, tmp_path):
    _, file = saved
    model = llama(intermediate_size=64)
    model.save_pretrained(tmp_path / "other")
    line = refused("merge", tmp_path / "other", file, tmp_path / "out")
    assert "up_proj: in_features and out_features are (32, 64), in the file (32, 48)" in line
    file.write_bytes(file.read_bytes()[:-3])
    assert "damaged" in refused("merge", tmp_path / "other", file, tmp_path / "out")
