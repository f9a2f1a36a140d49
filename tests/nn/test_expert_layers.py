"""`apply_randlora(target_parameters=...)` and its files, without PEFT."""

import copy

import pytest
import torch
from expert_models import EXPERTS, MODELS, batch, logits, make, train, with_scales
from layer_helpers import layers, randomize
from randlora_ext.nn.apply import adapted_layers
from torch import nn

from randlora_ext import (
    apply_randlora,
    calibrate,
    load_adapter,
    merge_and_unload,
    save_adapter,
    unload,
)


def applied(name="Mixtral", **options):
    options = {"r": 4, "seed": 1, "target_parameters": EXPERTS} | options
    return apply_randlora(make(name), **options)


ON_EVERY_MODEL = pytest.mark.parametrize("name", MODELS)


@pytest.fixture
def adapted(name):
    """With adapters of experts and of linear layers."""
    return randomize(applied(name, target_modules=["o_proj"]))


def assert_equal_but_for_rounding(one, other):
    assert (one - other).abs().max() < 1e-5 * other.abs().max()


@ON_EVERY_MODEL
def test_a_new_adapter_changes_nothing_yet(name):
    assert torch.equal(logits(applied(name, target_modules=["o_proj"])), logits(make(name)))


@ON_EVERY_MODEL
def test_training_experts_lowers_the_loss(name):
    losses = train(applied(name))
    assert losses[-1] < losses[0] / 5


@ON_EVERY_MODEL
def test_diagonals_are_stacks_of_one_for_each_expert(name):
    model = applied(name)
    assert {p.shape[0] for p in model.parameters() if p.requires_grad and p.dim() == 3} == {4}


@ON_EVERY_MODEL
def test_a_saved_adapter_comes_back(name, adapted, tmp_path):
    save_adapter(adapted, tmp_path)
    assert torch.equal(logits(load_adapter(make(name), tmp_path)), logits(adapted))


@ON_EVERY_MODEL
def test_merged_layers_compute_what_the_adapter_did(name, adapted):
    y = logits(adapted)
    for layer in layers(adapted).values():
        layer.merge()
    assert_equal_but_for_rounding(logits(adapted), y)


@ON_EVERY_MODEL
def test_disabling_merged_layers_restores_every_bit(name, adapted):
    before = copy.deepcopy(adapted.state_dict())
    for layer in layers(adapted).values():
        layer.merge()
        layer.disable()
    after = adapted.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


@ON_EVERY_MODEL
def test_a_state_dict_comes_back(name, adapted):
    other = applied(name, target_modules=["o_proj"])
    other.load_state_dict(adapted.state_dict())
    assert torch.equal(logits(other), logits(adapted))


@ON_EVERY_MODEL
def test_a_merged_model_is_the_base_model_with_the_update(name, adapted):
    y = logits(adapted)
    merged = merge_and_unload(adapted)
    assert merged.state_dict().keys() == make(name).state_dict().keys()
    assert_equal_but_for_rounding(logits(merged), y)


@ON_EVERY_MODEL
def test_an_unloaded_model_is_the_base_model(name, adapted):
    unloaded = unload(adapted)
    assert not layers(unloaded) and torch.equal(logits(unloaded), logits(make(name)))


# ---- several adapters ----------------------------------------------------------------------------


def activate(model, adapter_name):
    for layer in layers(model).values():
        layer.set_adapter(adapter_name)


def test_a_second_adapter_changes_nothing_yet():
    model = randomize(applied())
    for layer in layers(model).values():
        layer.update_layer("two", 8)
    activate(model, "two")
    assert torch.equal(logits(model), logits(make("Mixtral")))


def test_loading_beside_another_adapter(tmp_path):
    model = randomize(applied())
    y = logits(model)
    save_adapter(model, tmp_path)
    load_adapter(model, tmp_path, "two")
    activate(model, "two")
    assert torch.equal(logits(model), y)


def test_a_state_dict_of_other_shapes_changes_nothing():
    model = randomize(applied())
    y = logits(model)
    with pytest.raises(RuntimeError, match="does not fit"):
        model.load_state_dict({k: v[..., :1] for k, v in model.state_dict().items()})
    assert torch.equal(logits(model), y)


# ---- input scales, of each expert or one for all -------------------------------------------------


@pytest.fixture(params=[True, False], ids=["of each", "one for all"])
def of_each(request):
    return request.param


@pytest.fixture(params=["Qwen3Moe", "GptOss"])
def scaled(request, of_each):
    """(name, a model with input scales)"""
    name = request.param
    return name, with_scales(randomize(applied(name, target_parameters=EXPERTS[::-1])), of_each)


def test_experts_have_input_scales(scaled, of_each):
    for layer in layers(scaled[1]).values():
        scale = layer.randlora_input_scale["default"]
        assert scale.shape == (4, layer.in_features)
        assert of_each != torch.equal(scale[0], scale[1])


def test_the_input_scale_of_an_expert_scales_the_columns_of_its_update(scaled):
    for layer in layers(scaled[1]).values():
        scale = layer.randlora_input_scale["default"].clone()
        delta = layer.get_delta_weight("default")
        layer.set_input_scale("default", None)
        columns = scale[..., None] if layer.transposed else scale[..., None, :]
        torch.testing.assert_close(delta, layer.get_delta_weight("default") * columns)


def test_input_scales_of_too_few_experts_are_refused(scaled):
    for layer in layers(scaled[1]).values():
        with pytest.raises(ValueError, match=r"must be \(experts, in_features\) = \(4, "):
            layer.set_input_scale("default", torch.ones(3, layer.in_features))


def test_input_scales_of_experts_are_saved(scaled, tmp_path):
    name, model = scaled
    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(make(name), tmp_path)), logits(model))


def test_a_state_dict_takes_input_scales_away(scaled):
    """Also if the parameters were named in another order: layers are nested in one."""
    name, model = scaled
    other = randomize(applied(name))
    model.load_state_dict(other.state_dict())
    assert not any(layer.is_calibrated("default") for layer in layers(model).values())
    assert torch.equal(logits(model), logits(other))


# ---- files of layers inside adapted modules ------------------------------------------------------


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


# ---- what is refused -----------------------------------------------------------------------------

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


def test_a_parameter_that_is_adapted_already_is_refused():
    with pytest.raises(ValueError, match="is adapted already"):
        apply_randlora(applied(), target_parameters=EXPERTS[:1])


def test_the_weight_of_a_module_that_is_adapted_is_refused():
    with pytest.raises(ValueError, match="is of module .*q_proj', which is matched, too"):
        apply_randlora(make("Mixtral"), ["q_proj"], target_parameters=["q_proj.weight"])


MISFITS = {
    "taken": (applied, "has an adapter 'default' already"),
    "other sizes": (
        lambda: make("Qwen3Moe"), r"out_features \(32, 64\), and must be of \(32, 48\)"
    ),
    "no experts": (
        lambda: nn.Sequential(nn.Linear(2, 2)), "there is no such module or param"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_a_model_that_does_not_fit_a_file(case, tmp_path):
    make_model, message = MISFITS[case]
    save_adapter(applied(), tmp_path)
    with pytest.raises(ValueError, match=message):
        load_adapter(make_model(), tmp_path)


def test_offloaded_experts_are_refused():
    model = applied()
    model(**batch())
    pytest.importorskip("accelerate").cpu_offload(model, execution_device="cpu")
    with pytest.raises(RuntimeError, match="not whole here .* offloading"):
        model(**batch())


class OneToken(nn.Module):
    """Experts that multiply one token, a vector, with their whole stack."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x):
        return torch.matmul(x, self.weight.mT)


def test_experts_that_take_a_vector_are_calibrated():
    model = nn.Sequential(OneToken())
    apply_randlora(model, target_parameters=["0.weight"], r=2, basis="hadamard")
    calibrate(model, [token for token in torch.randn(40, 4)])
    assert model[0].is_calibrated("default")
