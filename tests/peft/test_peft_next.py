"""What PEFT changed around 0.21.2 and after, imitated, so that it holds with any version here."""

import copy

import pytest
import torch
from peft.tuners.tuners_utils import BaseTuner
from peft_helpers import (
    Deep,
    accelerated,
    deep_config,
    edit_config,
    layers,
    made,
    opened,
    randomize,
    relative,
)
from safetensors.torch import load_file, save_file
from torch import nn

from randlora_ext.peft.ternary_tensor import TernaryTensor

pytestmark = [
    pytest.mark.usefixtures("one_thread", "stock_peft"),
    pytest.mark.filterwarnings("ignore:(Found missing|randlora_alpha)"),
]


def replace_parameters(model, name):
    """New objects with the same numbers, as `cast_adapter_dtype` makes of 16-bit ones."""
    for layer in layers(model):
        for dictionary in (layer.randlora_lambda, layer.randlora_gamma):
            if name in dictionary:
                old = dictionary[name]
                dictionary[name] = nn.Parameter(old.detach().clone(), old.requires_grad)
                with torch.no_grad():
                    old.fill_(torch.nan)  # whoever holds it computes nonsense


@pytest.fixture
def replacing(monkeypatch):
    def cast(self, adapter_name, autocast_adapter_dtype=True):
        replace_parameters(self, adapter_name)

    monkeypatch.setattr(BaseTuner, "_cast_adapter_dtype", cast)


def step(model, x):
    """One step of SGD; the trained numbers afterwards."""
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.SGD(trained, lr=1e-8)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    optimizer.step()
    assert not all(map(torch.equal, before, trained))
    return [p.detach().clone() for p in trained]


@pytest.mark.parametrize("kind", [{"sparse": True}, {}, {"basis": "independent"}], ids=str)
def test_parameters_that_are_replaced_when_an_adapter_is_made(replacing, tmp_path, kind):
    x = torch.randn(6, 24)
    model = made(**kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BaseTuner, "_cast_adapter_dtype", lambda *args, **kwargs: None)
        plain = made(**kind)
    assert torch.equal(model(x), plain(x))
    for ours, want in zip(step(model, x), step(plain, x), strict=True):
        assert torch.equal(ours, want)
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


@pytest.mark.parametrize("when", ["before", "while", "compiled"])
def test_parameters_that_are_replaced_later(when):
    """No layer, basis or merged weight holds lambda and gamma across a call."""
    model, x = made(sparse=True), torch.randn(6, 24)
    want, weights = model(x), [layer.get_base_layer().weight.clone() for layer in layers(model)]
    run = torch.compile(model, backend="eager") if when == "compiled" else model
    assert relative(run(x), want) < 1e-6
    if when == "while":
        model.merge_adapter()
    replace_parameters(model, "default")
    if when == "while":
        model.unmerge_adapter()
    assert relative(run(x), want) < 1e-6
    assert all(torch.isfinite(p).all() for p in step(model, x))
    for keep in ("host", "nothing"):
        for layer in layers(model):
            layer.merge(keep_weight=keep)
        replace_parameters(model, "default")
        model.unmerge_adapter()
        for layer, weight in zip(layers(model), weights, strict=True):
            now = layer.get_base_layer().weight
            assert torch.equal(now, weight) or keep == "nothing" and relative(now, weight) < 1e-5


@pytest.mark.parametrize("calls", [True, False])
def test_a_tuner_that_calls_its_model(monkeypatch, calls):
    """Then hooks of the base model run; before, PEFT called its forward alone."""

    def forward(self, *args, **kwargs):
        return (self.model if calls else self.model.forward)(*args, **kwargs)

    monkeypatch.setattr(BaseTuner, "forward", forward)
    model, x = made(sparse=True).eval(), torch.randn(2, 24)
    want = copy.deepcopy(model).merge_and_unload()(x)
    seen = []
    model.base_model.model.register_forward_hook(lambda *args: seen.append(1))
    assert relative(model.base_model(x), want) < 1e-5
    assert len(seen) == calls
    mixed = model(x, adapter_names=["default", "__base__"])
    assert relative(mixed[0], want[0]) < 1e-5 and relative(mixed[1], Deep()(x)[1]) < 1e-5
    with model.disable_adapter():
        assert relative(model(x), Deep()(x)) < 1e-6


@pytest.mark.parametrize("keeps", [True, False])
def test_trainability_that_is_kept_or_not_when_an_adapter_is_added(monkeypatch, keeps):
    stock = BaseTuner.inject_adapter

    def inject_adapter(self, model, adapter_name, *args, **kwargs):
        before = {p: p.requires_grad for p in model.parameters()}
        has_adapters = any("randlora_" in name for name, _ in model.named_parameters())
        stock(self, model, adapter_name, *args, **kwargs)
        for p in model.parameters() if keeps and has_adapters else ():
            p.requires_grad_(before.get(p, False))

    monkeypatch.setattr(BaseTuner, "inject_adapter", inject_adapter)
    model, x = made(sparse=True), torch.randn(6, 24)
    model.base_model.model.a.get_base_layer().weight.requires_grad_(keeps)
    frozen = layers(model)[0].randlora_lambda["default"].requires_grad_(not keeps)
    model.add_adapter("two", deep_config(5, sparse=True))
    if keeps:
        assert not frozen.requires_grad
        assert model.base_model.model.a.get_base_layer().weight.requires_grad
    for name, p in model.named_parameters():
        assert not (name.endswith(".two") and p.requires_grad), name
    assert all(torch.isfinite(p).all() for p in step(model, x))
    model.set_adapter("two")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if "randlora_" in n and n.endswith(".two")}
    step(model, x)


LAYOUTS = {
    "model": ["base_model"],
    "first layer": ["base_model.model.a"],
    "every layer": ["base_model", *(f"base_model.model.{n}" for n in "abc")],
}


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("places", LAYOUTS.values(), ids=LAYOUTS)
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
    packed, of = [], TernaryTensor.of
    with monkeypatch.context() as patch:
        patch.setattr(TernaryTensor, "of", lambda dense: packed.append(1) or of(dense))
        loaded = opened(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert len(packed) == 4  # drawn from the key, and read: not once a layer
    assert torch.equal(loaded(x), model(x))
    randomize(loaded, seed=3)
    loaded.load_adapter(tmp_path, "default")
    assert torch.equal(loaded(x), model(x))
