"""`apply_randlora(target_parameters=...)` and its files, without PEFT."""

import copy

import pytest
import torch
from expert_models import EXPERTS, MODELS, batch, logits, make, train, with_scales
from layer_helpers import layers, randomize
from torch import nn

from randlora_ext import apply_randlora, load_adapter, merge_and_unload, save_adapter, unload
from randlora_ext.nn.apply import adapted_layers


def applied(name="Mixtral", **options):
    options = {"r": 4, "seed": 1, "target_parameters": EXPERTS} | options
    return apply_randlora(make(name), **options)


@pytest.mark.parametrize("name", MODELS)
def test_a_model(name, tmp_path):
    base, model = make(name), applied(name, target_modules=["o_proj"])
    plain = logits(base)
    assert torch.equal(logits(model), plain)
    losses = train(model)
    assert losses[-1] < losses[0] / 3
    assert {p.shape[0] for p in model.parameters() if p.requires_grad and p.dim() == 3} == {4}
    y, before = logits(model), copy.deepcopy(model.state_dict())
    save_adapter(model, tmp_path / "adapter")
    opened = load_adapter(base, tmp_path / "adapter")
    assert torch.equal(logits(opened), y)
    for layer in layers(model).values():
        layer.merge()
    assert (logits(model) - y).abs().max() < 1e-5 * y.abs().max()
    for layer in layers(model).values():
        layer.disable()
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    for layer in layers(model).values():
        layer.enable()
    model.load_state_dict(before)
    assert torch.equal(logits(model), y)
    merged = merge_and_unload(model)
    assert merged.state_dict().keys() == make(name).state_dict().keys()
    assert (logits(merged) - y).abs().max() < 1e-5 * y.abs().max()
    unloaded = unload(opened)
    assert not layers(unloaded) and torch.equal(logits(unloaded), plain)


def test_a_second_adapter(tmp_path):
    model = randomize(applied())
    y = logits(model)
    save_adapter(model, tmp_path / "one")
    for layer in layers(model).values():
        layer.update_layer("two", 8)
        layer.set_adapter("two")
    assert torch.equal(logits(model), logits(make("Mixtral")))
    load_adapter(model, tmp_path / "one", "three")
    for layer in layers(model).values():
        layer.set_adapter("three")
    assert torch.equal(logits(model), y)
    with pytest.raises(RuntimeError, match="does not fit"):
        model.load_state_dict({k: v[..., :1] for k, v in model.state_dict().items()})
    assert torch.equal(logits(model), y)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("name", ["Qwen3Moe", "GptOss"])
def test_experts_have_input_scales_of_their_own_or_one_for_all(name, own, tmp_path):
    model = randomize(applied(name, target_parameters=EXPERTS[::-1]))
    plain = [layer.get_delta_weight("default") for layer in layers(model).values()]
    for layer, delta in zip(layers(with_scales(model, own)).values(), plain, strict=True):
        scale = layer.randlora_input_scale["default"]
        assert scale.shape == (4, layer.in_features) and own != torch.equal(scale[0], scale[1])
        by_hand = delta * (scale[..., None] if layer.transposed else scale[..., None, :])
        torch.testing.assert_close(layer.get_delta_weight("default"), by_hand)
        with pytest.raises(ValueError, match=r"must be \(experts, in_features\) = \(4, "):
            layer.set_input_scale("default", scale[:3])
    y = logits(model)
    save_adapter(model, tmp_path / "adapter")
    opened = load_adapter(make(name), tmp_path / "adapter")
    assert torch.equal(logits(opened), y)
    opened.load_state_dict((other := randomize(applied(name))).state_dict())
    assert not any(layer.is_calibrated("default") for layer in layers(opened).values())
    assert torch.equal(logits(opened), logits(other))  # layers are nested in one order


class Own(nn.Module):
    def __init__(self, *shape, dtype=torch.float32):
        super().__init__()
        self.experts, self.tied = nn.Parameter(torch.ones(shape, dtype=dtype)), nn.Identity()


def test_a_file_of_a_linear_layer_inside_an_adapted_module(tmp_path):
    """It has the path of the base model, in which a user's module may be called base_layer."""

    def model():
        outer = Own(2, 4, 4)
        outer.tied, outer.base_layer = nn.Linear(4, 4), nn.ModuleDict({"tied": nn.Linear(4, 4)})
        return nn.Sequential(outer)

    saved = randomize(apply_randlora(model(), ["tied"], target_parameters=["experts"], r=2))
    trained = [p for p in saved.parameters() if p.requires_grad]
    save_adapter(saved, tmp_path / "adapter")
    opened = load_adapter(model(), tmp_path / "adapter")
    again = [p for p in opened.parameters() if p.requires_grad]
    assert len(trained) == 6 and all(map(torch.equal, again, trained))


def test_a_file_of_experts_inside_a_module_called_base_layer(tmp_path):
    """Its own name stays, below another module and below one of our layers."""

    def model():
        outer = Own(2, 4, 4)
        outer.base_layer = nn.ModuleDict({"inner": Own(3, 5, 4)})
        return nn.Sequential(outer, nn.ModuleDict({"base_layer": Own(2, 4, 4)}))

    names = ["0.experts", "0.base_layer.inner.experts", "1.base_layer.experts"]
    saved = randomize(apply_randlora(model(), target_parameters=["experts"], r=2))
    assert [*adapted_layers(saved)] == names
    trained = [p for p in saved.parameters() if p.requires_grad]
    save_adapter(saved, tmp_path / "adapter")
    opened = load_adapter(model(), tmp_path / "adapter")
    again = [p for p in opened.parameters() if p.requires_grad]
    assert len(trained) == 6 and all(map(torch.equal, again, trained))


ERRORS = [
    (lambda: nn.ModuleList([Own(2, 3, 4, 5)]), {}, ValueError, r"two or three dim.*\(2, 3, 4, 5\)"),
    (lambda: nn.ModuleList([Own(4)]), {}, ValueError, r"Own.experts must have two or three dimens"),
    (lambda: nn.ModuleList([Own(2, 3, dtype=torch.float16)]), {"density": 0.1}, ValueError, "need"),
    (lambda: nn.ModuleList([Own(2, 3)]), {"basis": "independent"}, ValueError, "need basis="),
    (lambda: nn.ModuleList([Own(2, 3)]), {"randlora_dropout": 0.1}, ValueError, "dropout=0.1"),
    (lambda: nn.ModuleList([Own(2, 3)]), {"rank": 3}, TypeError, "unexpected keyword .*'rank'"),
    (lambda: nn.ModuleList([nn.Linear(2, 3)]), {}, ValueError, "matches no parameter"),
    (lambda: Own(2, 3, 4), {}, ValueError, "'.experts' would not be adapted: the model is the lay"),
    (lambda: nn.ModuleList([Own(2, 3, 4)] * 2), {}, ValueError, "0.experts' is used under several"),
]


@pytest.mark.parametrize("make_model, options, error, told", ERRORS)
def test_errors_change_nothing(make_model, options, error, told):
    model = make_model()
    modules, trained = [*model.modules()], [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=told):
        apply_randlora(model, target_parameters=["experts"], **options)
    assert [*model.modules()] == modules
    assert [p.requires_grad for p in model.parameters()] == trained


def test_refused(tmp_path):
    model = applied()
    with pytest.raises(ValueError, match="is adapted already"):
        apply_randlora(model, target_parameters=EXPERTS[:1])
    with pytest.raises(ValueError, match="is of module .*q_proj', which is matched, too"):
        apply_randlora(make("Mixtral"), ["q_proj"], target_parameters=["q_proj.weight"])
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="has an adapter 'default' already"):
        load_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"out_features \(32, 64\), and must be of \(32, 48\)"):
        load_adapter(make("Qwen3Moe"), tmp_path / "adapter")
    with pytest.raises(ValueError, match="there is no such module or param"):
        load_adapter(nn.Sequential(nn.Linear(2, 2)), tmp_path / "adapter")
    model(**batch())
    pytest.importorskip("accelerate").cpu_offload(model, execution_device="cpu")
    with pytest.raises(RuntimeError, match="not whole here .* offloading"):
        model(**batch())
