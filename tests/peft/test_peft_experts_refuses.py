"""What adapters of fused experts refuse, in configurations, files and uses."""

import pytest
import torch
from compile_helpers import fresh_dynamo as fresh_dynamo
from expert_models import EXPERTS, batch
from peft_experts import WAYS, Mixture, moe, wrappers
from peft_helpers import (
    accelerated,
    adapted,
    assert_unchanged,
    config,
    layers,
    numbers,
    peft,
    randomize,
)

from randlora_ext import apply_randlora

ERRORS = [
    ({"basis": "peft"}, ValueError, 'need basis="hadamard".*got basis=.peft'),
    ({"randlora_dropout": 0.1}, ValueError, "and randlora_dropout=0, got .*=0.1"),
    ({"target_parameters": "experts"}, TypeError, "target_parameters must be a list of texts"),
    ({"target_parameters": ["expert.up"]}, ValueError, "matches no parameter .*gate_up"),
    ({"targets": ["nothing"]}, ValueError, "target_modules .*nothing.* matches no linear layer"),
]


@pytest.mark.parametrize("options, error, told", ERRORS)
def test_refused_configurations(options, error, told):
    with pytest.raises(error, match=told):
        moe(**options)


@pytest.fixture
def of_other_parameters(tmp_path):
    """A model whose adapter is of one parameter; the folder has one of the other, of its shape."""
    saved, model = (moe(target_parameters=[name]) for name in EXPERTS)
    saved.save_pretrained(tmp_path)
    return model


def test_hotswap_refuses_a_file_of_another_parameter(tmp_path, of_other_parameters):
    before = numbers(of_other_parameters)
    with pytest.raises(ValueError, match="its target_parameters are .*gate_up.*, not .*down"):
        accelerated.hotswap_adapter(of_other_parameters, tmp_path)
    assert_unchanged(of_other_parameters, before)


def test_load_adapter_refuses_a_file_of_another_parameter(tmp_path, of_other_parameters):
    before = numbers(of_other_parameters)
    with pytest.raises(RuntimeError, match="target_parameters of the tensors is .*gate_up.*, not"):
        of_other_parameters.load_adapter(tmp_path, "default")
    assert_unchanged(of_other_parameters, before)


def test_a_second_adapter_must_be_of_the_same_parameters():
    more = {"basis": "hadamard", "target_parameters": EXPERTS[:1]}
    with pytest.raises(ValueError, match="target_parameters must be .*down_proj.* of adapter"):
        moe().add_adapter("two", config(4, accelerated.RandLoraConfig, [], **more))


def test_stock_peft_has_no_such_adapters(tmp_path):
    with pytest.raises(ValueError, match="stock PEFT lacks; merge instead"):
        accelerated.export_to_peft(moe(), tmp_path)


def test_no_conversion_to_lora():
    with pytest.raises(TypeError, match="do not support LoRA conversion.*ParamWrapper"):
        peft.convert_to_lora(moe(), rank=4)


def test_rows_of_a_batch_cannot_have_different_adapters():
    with pytest.raises(ValueError, match="adapter_names cannot choose among adapters of target_p"):
        moe().eval()(**batch(), adapter_names=["default"] * 2)


def test_torch_jit_trace_is_refused():
    with pytest.raises(RuntimeError, match="torch.jit.trace cannot record"):
        torch.jit.trace(wrappers(moe())[0], torch.ones(2, 32))


def below_base_layer():
    return torch.nn.Sequential(torch.nn.ModuleDict({"base_layer": Mixture(WAYS["matmul"])}))


def test_a_parameter_below_a_module_called_base_layer_is_refused():
    net = below_base_layer()
    with pytest.raises(ValueError, match="'0.base_layer.up' lies in a module called 'base_layer'"):
        adapted(net, [], 4, basis="hadamard", target_parameters=["up"])
    assert not layers(net)


def test_without_peft_a_parameter_below_a_module_called_base_layer_is_adapted():
    net = below_base_layer()
    apply_randlora(net, target_parameters=["up"], r=4)
    assert type(net[0]["base_layer"]).__name__ == "RandLoraParameter"


INSIDE = ["0.up", "0.linear.weight"]  # one lies in a module of which the other is a parameter


def test_a_parameter_inside_a_module_with_another_is_refused():
    net = torch.nn.Sequential(Mixture(WAYS["matmul"]))
    with pytest.raises(ValueError, match="'0.linear.weight' lies inside '0', of which a parameter"):
        adapted(net, [], 4, basis="hadamard", target_parameters=INSIDE)
    assert not layers(net)


def test_without_peft_a_parameter_inside_a_module_with_another_is_trained():
    net = torch.nn.Sequential(Mixture(WAYS["matmul"]))
    apply_randlora(net, target_parameters=INSIDE, r=4)
    randomize(net)
    net(torch.randn(5, 24)).sum().backward()
    grads = [p.grad for name, p in net.named_parameters() if "randlora_" in name]
    assert len(grads) == 4 and all(bool(grad.any()) for grad in grads)
