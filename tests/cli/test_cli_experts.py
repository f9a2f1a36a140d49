"""`randlora merge` of adapters of experts, into files that hold them fused or one by one."""

import json
import re
import shutil

import pytest
import torch
from cli_helpers import refused, run
from expert_models import EXPERTS, MODELS, make, with_scales
from peft_helpers import adapted, edit, randomize
from safetensors.torch import load_file, save_file

from randlora_ext import apply_randlora, merge_and_unload, save_adapter


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_merge(name, own, tmp_path):
    base = make(name).to(torch.bfloat16 if own else torch.float32)
    base.save_pretrained(tmp_path / "base")
    if own:
        model = randomize(apply_randlora(base, ["o_proj"], target_parameters=EXPERTS, r=4))
        with_scales(model)
        save_adapter(model, tmp_path / "adapter")
        wanted = merge_and_unload(model)
    else:
        chosen = {"basis": "hadamard", "target_parameters": EXPERTS[::-1]}
        model = with_scales(adapted(base, [], 4, **chosen))
        model.save_pretrained(tmp_path / "adapter")
        wanted = model.merge_and_unload()
    code, _, err = run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert code == 0, err
    opened = type(wanted).from_pretrained(tmp_path / "merged", dtype="auto")
    state = opened.state_dict()
    assert all(torch.equal(state[key], value) for key, value in wanted.state_dict().items())


class Stack(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = torch.nn.Parameter(torch.ones(2, 4, 4))
        self.base_layer = torch.nn.ModuleDict({"inner": torch.nn.Linear(4, 4)})


def test_a_module_called_base_layer(tmp_path):
    """Around experts, and in a module with adapted experts."""
    net = torch.nn.ModuleDict({"base_layer": Stack()})
    (tmp_path / "base").mkdir()
    save_file(net.state_dict(), tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "mixtral"}')
    apply_randlora(net, ["inner"], target_parameters=["experts"], r=2)
    save_adapter(randomize(net), tmp_path / "adapter")
    code, _, err = run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert code == 0, err
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    wanted = merge_and_unload(net).state_dict()
    assert merged.keys() == wanted.keys()
    assert all(torch.equal(merged[key], value) for key, value in wanted.items())


def test_refused(tmp_path):
    make("Mixtral").save_pretrained(tmp_path / "base")
    chosen = {"basis": "hadamard", "target_parameters": EXPERTS}
    adapted(make("Mixtral"), [], 4, **chosen).save_pretrained(tmp_path / "adapter")
    shutil.copytree(tmp_path / "adapter", edited := tmp_path / "edited")
    edit(edited / "adapter_config.json", target_parameters=EXPERTS[::-1])  # of other nesting
    assert "target_parameters of the tensors is" in refused(
        "merge", tmp_path / "base", edited, tmp_path / "merged"
    )
    file = tmp_path / "base" / "model.safetensors"
    tensors, last = load_file(file), "model.layers.1.block_sparse_moe.experts.3."
    for missing, told in (
        (f"{last}w2", r"down_proj must .* for each of 4 experts, and is \(3, 32, 32\)"),
        (f"{last}w1", "has no tensor model.layers.1.mlp.experts.gate_up_proj, nor what it is made"),
    ):
        save_file({key: value for key, value in tensors.items() if missing not in key}, file)
        error = refused("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
        assert re.search(told, error)
    for name in ("Mixtral", "GptOss"):
        make(name, num_local_experts=5).save_pretrained(tmp_path / name)
        told = refused("merge", tmp_path / name, tmp_path / "adapter", tmp_path / "merged")
        assert "each of 4 experts, and is (5, " in told
    make(name).save_pretrained(tmp_path / name)  # whose down_proj is square
    config = json.loads((tmp_path / name / "config.json").read_text())
    for field in ({"auto_map": {}}, {"model_type": "qwen3_vl_moe"}):
        (tmp_path / name / "config.json").write_text(json.dumps(config | field))
        told = refused("merge", tmp_path / name, tmp_path / "adapter", tmp_path / "merged")
        assert "only the model's code" in told
    assert not (tmp_path / "merged").exists()
