"""What PEFT changed around 0.21.2 and after, imitated, so that it holds with any version here."""

import pytest
import torch
from peft.tuners.tuners_utils import BaseTuner
from peft_helpers import accelerated, edit_config, layers, made, opened, randomize, relative
from safetensors.torch import load_file, save_file
from torch import nn

from randlora_ext.peft.basis_tensor import BasisTensor

pytestmark = pytest.mark.filterwarnings("ignore:(Found missing|randlora_alpha)")


def replace_parameters(model, adapter_name="default", **_):
    """New objects with the same numbers, as `cast_adapter_dtype` makes of 16-bit ones."""
    for layer in layers(model):
        for dictionary in (layer.randlora_lambda, layer.randlora_gamma):
            if adapter_name in dictionary:
                old = dictionary[adapter_name]
                dictionary[adapter_name] = nn.Parameter(old.detach().clone(), old.requires_grad)
                with torch.no_grad():
                    old.fill_(torch.nan)  # whoever holds it computes nonsense


def step(model, x):
    """One step of SGD; the trained numbers afterwards."""
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    model(x).square().sum().backward()
    torch.optim.SGD(trained, lr=1e-8).step()
    assert all(p.isfinite().all() for p in trained)
    assert not any(map(torch.equal, before, trained))
    return trained


@pytest.mark.parametrize("kind", [{"sparse": True}, {"basis": "independent"}], ids=str)
def test_parameters_that_are_replaced_when_an_adapter_is_made(monkeypatch, tmp_path, kind, x):
    plain = made(**kind)
    monkeypatch.setattr(BaseTuner, "_cast_adapter_dtype", replace_parameters)
    model = made(**kind)
    assert torch.equal(model(x), plain(x))
    assert all(map(torch.equal, step(model, x), step(plain, x)))
    model.save_pretrained(tmp_path)
    loaded = opened(tmp_path)
    loaded.load_adapter(tmp_path, "two")
    for name in ("default", "two"):
        loaded.set_adapter(name)
        assert torch.equal(loaded(x), model(x))
    randomize(loaded, seed=3)
    accelerated.hotswap_adapter(loaded, tmp_path)
    loaded.set_adapter("default")
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("compiled", [False, True])
def test_parameters_that_are_replaced_later(compiled):
    """No layer, basis or merged weight holds lambda and gamma across a call."""
    model, x = made(sparse=True), torch.randn(6, 24)
    want, weights = model(x), [layer.get_base_layer().weight.clone() for layer in layers(model)]
    run = torch.compile(model, backend="eager") if compiled else model
    assert relative(run(x), want) < 1e-6
    replace_parameters(model)
    assert relative(run(x), want) < 1e-6
    step(model, x)
    for keep in ("host", "nothing"):
        for layer in layers(model):
            layer.merge(keep_weight=keep)
        replace_parameters(model)
        model.unmerge_adapter()
        for layer, weight in zip(layers(model), weights, strict=True):
            now = layer.get_base_layer().weight
            assert torch.equal(now, weight) or keep == "nothing" and relative(now, weight) < 1e-5


LAYERS = [f"base_model.model.{name}" for name in "abc"]


@pytest.mark.parametrize(
    "places, low_cpu_mem_usage",
    [(["base_model"], True), (LAYERS[:1], False), (["base_model", *LAYERS], True)],
    ids=["model", "first layer", "every layer"],
)
def test_files_with_bases_at_other_places(tmp_path, monkeypatch, places, low_cpu_mem_usage):
    """Older files hold them under every layer, too; deduplicated ones at one place."""
    model, x = made(sparse=True), torch.randn(6, 24)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    bases = {n: tensors.pop(f"base_model.{n}") for n in ("randlora_A", "randlora_B")}
    for place in places:
        tensors |= {f"{place}.{name}": basis.clone() for name, basis in bases.items()}
    save_file(tensors, file)
    edit_config(tmp_path, projection_prng_key=9)
    packed, pack = [], BasisTensor.packed
    with monkeypatch.context() as patch:
        patch.setattr(BasisTensor, "packed", lambda dense: packed.append(1) or pack(dense))
        loaded = opened(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert len(packed) == 4  # drawn from the key, and read: not once a layer
    assert torch.equal(loaded(x), model(x))
    randomize(loaded, seed=3)
    loaded.load_adapter(tmp_path, "default")
    assert torch.equal(loaded(x), model(x))
