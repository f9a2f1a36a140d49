"""What adapters of fused experts refuse, in configurations, files and uses."""

import pytest
import torch
from expert_models import EXPERTS, batch, logits
from peft_experts import WAYS, Mixture, experts_of, moe, parameters_of
from peft_helpers import (
    accelerated,
    adapted,
    assert_unchanged,
    config,
    layers,
    numbers,
    peft,
)
from torch import nn

ERRORS = [
    ({"basis": "peft"}, ValueError, "need basis='hadamard' and .*got basis='peft'"),
    ({"randlora_dropout": 0.1}, ValueError, "and randlora_dropout=0, got .*=0.1"),
    ({"target_parameters": "experts"}, TypeError, "target_parameters must be a list of names"),
    ({"target_parameters": ["expert.up"]}, ValueError, "matches no parameter .*gate_up"),
    ({"targets": ["nothing"]}, ValueError, "target_modules .*nothing.* matches no linear layer"),
]


@pytest.mark.parametrize("options, error, told", ERRORS)
def test_refused_configurations(options, error, told):
    with pytest.raises(error, match=told):
        moe(**options)


# ---- parameters that cannot be adapted -----------------------------------------------------------


class Own(nn.Module):
    def __init__(self, *shape, dtype=torch.float32):
        super().__init__()
        self.experts = nn.Parameter(torch.ones(shape).to(dtype), requires_grad=False)


PARAMETERS = {
    "four dimensions": (lambda: nn.ModuleList([Own(2, 3, 4, 5)]), r"two or three dim.*\(2, 3, 4"),
    "one dimension": (lambda: nn.ModuleList([Own(4)]), "Own.experts must have two or three dimens"),
    "integers": (
        lambda: nn.ModuleList([Own(2, 3, 4, dtype=torch.int8)]),
        "Own.experts must be a floating point parameter, got torch.int8",
    ),
    "no such name": (lambda: nn.ModuleList([nn.Linear(2, 3)]), "matches no parameter"),
    "of the model": (lambda: Own(2, 3, 4), "'.experts' would not be adapted: the model is the lay"),
    "two names": (lambda: nn.ModuleList([Own(2, 3, 4)] * 2), "0.experts' is used under several"),
}


@pytest.mark.parametrize("case", PARAMETERS)
def test_errors_change_nothing(case):
    make_model, told = PARAMETERS[case]
    model = make_model()
    modules = [*model.modules()]
    with pytest.raises((TypeError, ValueError), match=told):
        adapted(model, [], 2, basis="hadamard", target_parameters=["experts"])
    assert [*model.modules()] == modules


def test_a_parameter_inside_a_module_with_another_is_refused():
    net = nn.Sequential(Mixture(WAYS["matmul"]))
    inside = ["0.up", "0.linear.weight"]
    with pytest.raises(ValueError, match="'0.linear.weight' lies inside '0', of which a parameter"):
        adapted(net, [], 4, basis="hadamard", target_parameters=inside)
    assert not layers(net)


def test_the_weight_of_a_linear_layer_that_is_adapted_is_refused():
    net = nn.Sequential(nn.Linear(24, 24))
    with pytest.raises(ValueError, match="'0', which is not a valid target|wrap an `nn.Parameter`"):
        adapted(net, ["0"], 4, basis="hadamard", target_parameters=["0.weight"])


# ---- files ---------------------------------------------------------------------------------------


@pytest.fixture
def of_the_other(tmp_path):
    """A model whose adapter is of one parameter; the folder has one of the other."""
    saved, model = (moe(target_parameters=[name]) for name in EXPERTS)
    saved.save_pretrained(tmp_path)
    return model


@pytest.mark.filterwarnings("ignore:Already found")
def test_tensors_of_another_parameter_are_told_and_not_loaded(tmp_path, of_the_other):
    """By their names. As of any layers that the adapter does not have."""
    before = numbers(of_the_other)
    with pytest.warns(UserWarning) as told:
        of_the_other.load_adapter(tmp_path, "default")
    told = "\n".join(str(w.message) for w in told)
    assert "4 tensors have no place" in told and "adapted_parameters.gate_up_proj" in told
    assert "4 tensors of the adapter are missing and stay as they were" in told
    assert_unchanged(of_the_other, before)


@pytest.mark.parametrize("name, wrapped", [("default", False), ("default", True), ("two", True)])
def test_names_that_only_wrapping_has_changed_are_refused(tmp_path, name, wrapped):
    """The linear layer lies inside a module of which a parameter is adapted, or is not."""
    linear, both = (
        adapted(nn.Sequential(Mixture(WAYS["matmul"])), ["linear"], 4, basis="hadamard", **more)
        for more in ({}, {"target_parameters": ["0.up"]})
    )
    saved, model = (linear, both) if wrapped else (both, linear)
    saved.save_pretrained(tmp_path)
    before = numbers(model)
    told = f"adapter {name!r}.* does not fit: in it the names of .*linear.* differ by base_layer"
    with pytest.raises(RuntimeError, match=told):
        model.load_adapter(tmp_path, name)
    if name == "two":
        model.delete_adapter("two")
    assert_unchanged(model, before)


def test_a_file_of_other_sizes_is_refused(tmp_path):
    moe("Mixtral").save_pretrained(tmp_path)
    model = moe("Qwen3Moe")
    before = numbers(model)
    with pytest.raises(
        RuntimeError, match="(?s)does not fit.*out_features of the .* is 64, not 48"
    ):
        model.load_adapter(tmp_path, "default")
    assert_unchanged(model, before)


def test_a_state_dict_of_other_shapes_changes_nothing():
    model = moe()
    y, wrong = logits(model), {k: v[..., :1] for k, v in model.state_dict().items()}
    experts = {k: v for k, v in wrong.items() if "gate_up_proj.randlora_" in k}
    with pytest.raises(RuntimeError, match="does not fit"):
        model.load_state_dict(experts, strict=False)
    assert torch.equal(logits(model), y)


def weights_of(model):
    return {k: v + 1 for k, v in model.state_dict().items() if k.endswith("base_layer.down_proj")}


def adapters_of(model):
    return {k: v + 1 for k, v in model.state_dict().items() if "down_proj.randlora_lambda" in k}


@pytest.mark.parametrize("part", [weights_of, adapters_of])
def test_nothing_is_loaded_into_merged_experts(part):
    model = moe()
    before = numbers(model)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"call unmerge\(\) first"):
        model.load_state_dict(part(model), strict=False)
    model.unmerge_adapter()
    assert_unchanged(model, before)


# ---- uses ----------------------------------------------------------------------------------------


def test_no_conversion_to_lora():
    with pytest.raises(TypeError, match="do not support LoRA conversion.*AcceleratedParameter"):
        peft.convert_to_lora(moe(), rank=4)


def test_rows_of_a_batch_cannot_have_different_adapters():
    with pytest.raises(ValueError, match="adapter_names cannot choose among adapters of target_p"):
        moe().eval()(**batch(), adapter_names=["default"] * 2)


def test_rows_of_a_batch_beside_linear_layers():
    model = moe(targets=["q_proj"]).eval()
    with pytest.raises(ValueError, match="adapter_names cannot choose among adapters of target_p"):
        model(**batch(), adapter_names=["default"] * 2)


def test_torch_jit_trace_is_refused():
    with pytest.raises(RuntimeError, match="torch.jit.trace cannot record"):
        torch.jit.trace(experts_of(moe()), torch.ones(2, 32))


def test_offloaded_experts_are_refused():
    model = moe()
    model(**batch())
    pytest.importorskip("accelerate").cpu_offload(model, execution_device="cpu")
    with pytest.raises(RuntimeError, match="not whole here .* offloading"):
        model(**batch())


def test_a_safe_merge_refuses_nan_and_changes_nothing():
    model = moe()
    before = numbers(model)
    layer = parameters_of(model)["down_proj"]
    nn.init.constant_(layer.randlora_lambda["default"][1], torch.nan)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert not any(each.merged for each in parameters_of(model).values())
    weights = {name: value for name, value in before.items() if "randlora_" not in name}
    now = model.state_dict()
    assert all(torch.equal(now[name], value) for name, value in weights.items())


def test_an_adapter_that_fails_leaves_the_first():
    model = moe()
    before, names = numbers(model), [name for name, _ in model.named_modules()]
    wrong = config(4, accelerated.RandLoraConfig, [], basis="hadamard", target_parameters=["no"])
    with pytest.raises(ValueError, match="matches no parameter"):
        model.add_adapter("two", wrong)
    assert [name for name, _ in model.named_modules()] == names
    assert_unchanged(model, before)
