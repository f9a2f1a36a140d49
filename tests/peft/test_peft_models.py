"""randlora_ext.peft in models of transformers, compiled and exported; injected adapters."""

import copy
import functools

import pytest
import torch
from compile_helpers import assert_steps_agree, compiled, graphs
from compile_helpers import fresh_dynamo as fresh_dynamo
from expert_models import batch
from language_models import llama
from peft_helpers import (
    Deep,
    Wide,
    accelerated,
    adapted,
    assert_close,
    config,
    edit,
    layers,
    made,
    opened,
    pair,
    peft,
    randomize,
    relative,
    runs_on_kernels,
    small_llama,
    t5,
    trainer_of,
)
from safetensors.torch import load_file
from torch import nn
from torch.export import Dim

from randlora_ext import RandLoraLinear

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:.*(checkpointing|use_reentrant|pin_memory)"),
]


def models(make):
    base, chosen = make()
    return pair(base, lambda: config(8, sparse=True, **chosen))


def loss_and_gradients(model):
    """(loss, logits, gradients)"""
    model.zero_grad()
    output = model(**batch())
    output.loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    return [output.loss, output.logits, *gradients]


@pytest.mark.parametrize("make", [small_llama, t5])
def test_forward_gradients_and_merging_are_those_of_stock(make):
    stock, ours = models(make)
    assert runs_on_kernels(ours)
    assert_close(loss_and_gradients(ours), loss_and_gradients(stock), 1e-4)
    merged = [dict(m.eval().merge_and_unload().named_parameters()) for m in (ours, stock)]
    assert merged[0].keys() == merged[1].keys()
    assert all(relative(merged[0][name], merged[1][name]) < 1e-5 for name in merged[1])


def test_trainer(tmp_path):
    losses, resumed = [], []
    for i, model in enumerate(models(small_llama)):
        model.enable_input_require_grads()  # transformers 4 checkpoints reentrantly
        folder, rows = tmp_path / str(i), [*batch()["input_ids"]] * 3
        trainer = trainer_of(model, folder, rows, gradient_checkpointing=True)
        # ours also from the checkpoint of stock: adapter, optimizer and scheduler
        for found, start in ((losses, None), (resumed, str(tmp_path / "0" / "checkpoint-2"))):
            trainer.train(resume_from_checkpoint=start)
            found.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert resumed[1][-1] == pytest.approx(resumed[0][-1], rel=1e-4)
    # a checkpoint is an adapter
    assert runs_on_kernels(opened(folder / "checkpoint-2", lambda: small_llama()[0]))


def test_multihead_attention():
    """torch reads the weights of its projections, fused or not, and never calls them."""
    base = nn.ModuleDict({"attn": nn.MultiheadAttention(32, 4)})
    x = torch.randn(2, 5, 32)
    before = base["attn"](x, x, x)[0]
    message = "module 'attn.out_proj' would not be adapted: nn.MultiheadAttention reads"
    with pytest.warns(UserWarning, match=message):
        adapted(base, ["out_proj"], sparse=True)
    after = base["attn"](x, x, x)[0]
    assert torch.equal(after, before) and not after.requires_grad


def test_injected_adapters(x):
    """Without a PeftModel, as diffusers and transformers use PEFT. Bases are written once: by ours
    under the first layer, by PEFT after 0.21.2 (huggingface/peft#3714) under any.
    """
    states, outputs, ways = {}, [], (accelerated.disable, accelerated.enable)
    for way in ways:
        way()
        model = randomize(peft.inject_adapter_in_model(config(5, sparse=True), Deep()))
        states[way] = peft.get_peft_model_state_dict(model)
        outputs.append(model(x))
    assert relative(*outputs) < 1e-6
    assert sum(key.endswith("randlora_A") for key in states[accelerated.enable]) == 1
    for layer in "abc":
        drop = [f"{name}.randlora_{basis}" for name in "abc" for basis in "AB" if name != layer]
        states[layer] = {k: v for k, v in states[accelerated.disable].items() if k not in drop}
    for state in states.values():
        for way in ways:
            way()
            other = config(5, sparse=True, projection_prng_key=9)  # other bases at first
            model = peft.inject_adapter_in_model(other, Deep())
            peft.set_peft_model_state_dict(model, state)
            assert relative(model(x), outputs[0]) < 1e-6


def test_adapters_are_injected_whatever_peft_says_of_shared_bases(monkeypatch, x):
    """As it may of its own RandLoRA, whose layers need the model."""
    monkeypatch.setattr(peft.RandLoraModel, "uses_shared_state", True, raising=False)
    accelerated.enable()
    model = peft.inject_adapter_in_model(config(5, sparse=True), Deep())
    assert len(layers(model)) == 3 and torch.equal(model(x), Deep()(x))


def test_a_second_injected_adapter_leaves_the_first(x):
    """Stock PEFT gives every layer a new dictionary of bases, without the first adapter's."""
    accelerated.enable()
    model = peft.inject_adapter_in_model(config(5, sparse=True), Deep())
    first = randomize(model)(x)
    peft.inject_adapter_in_model(config(3, sparse=True), model, adapter_name="two")
    for layer in layers(model):
        layer.set_adapter("default")
    assert torch.equal(model(x), first)
    for layer in layers(model):
        layer.set_adapter("two")
    assert relative(randomize(model, seed=2)(x), first) > 0.1


@pytest.mark.parametrize("targets", [None, "all-linear"], ids=str)
def test_targets_that_peft_chooses(targets):
    """By the type of the model, or all linear layers; a second adapter meets wrapped layers."""
    base, tokens = llama(num_hidden_layers=1), torch.randint(0, 50, (2, 6))
    chosen = functools.partial(peft.RandLoraConfig, r=8, sparse=True, target_modules=targets)
    names, outputs = [], []
    for model in pair(base, chosen):
        model.add_adapter("two", chosen())
        model.base_model.set_adapter(["default", "two"])
        outputs.append(randomize(model)(tokens).logits)
        names.append([name for name, _ in model.named_parameters()])
    assert names[0] == names[1] and any(name.endswith("_lambda.two") for name in names[1])
    assert relative(outputs[1], outputs[0]) < 1e-5


def test_transformers_integration(tmp_path, monkeypatch):
    integration = pytest.importorskip("transformers.integrations.peft")
    monkeypatch.setattr(integration, "MIN_PEFT_VERSION", "0.18.0")  # newer ones ask for 0.22
    monkeypatch.setattr("transformers.utils.peft_utils.check_peft_version", lambda **_: None)
    accelerated.enable()
    tokens = torch.randint(0, 50, (2, 6))
    model = llama()
    model.add_adapter(config(8, targets=["q_proj", "down_proj"], sparse=True))
    wanted = randomize(model)(tokens).logits
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(key.endswith("randlora_A") for key in saved) == 1
    edit(tmp_path / "adapter_config.json", projection_prng_key=9)
    loaded = llama()
    loaded.load_adapter(tmp_path)
    for model in (loaded, peft.PeftModel.from_pretrained(llama(), tmp_path)):
        assert relative(model(tokens).logits, wanted) < 1e-6


def test_an_adapter_of_larger_layers(x):
    """Stock PEFT refuses it and asks for the reverse order."""
    larger = {"targets": ["other", "a"], "sparse": True}
    model, alone = made(base=Wide, sparse=True), made(base=Wide, **larger)
    model.add_adapter("two", config(5, **larger))
    randomize(model)
    model.set_adapter("two")
    state = peft.get_peft_model_state_dict(model, adapter_name="two")
    state = {k: v for k, v in state.items() if "base_model.randlora" not in k}
    peft.set_peft_model_state_dict(alone, state)
    assert torch.equal(model(x), alone(x))


@pytest.mark.parametrize("targets", ["q_proj", ["q_proj", "d"], ["d.in_proj"]], ids=str)
def test_wrong_targets_list_the_layers_that_exist(targets):
    modules = {"c": nn.Linear(8, 8), "d": nn.MultiheadAttention(8, 2)}
    message = r"target_modules .* matches no linear layer of ModuleDict; .* \['c', 'd.out_proj'\]"
    base = nn.ModuleDict(modules)
    model = adapted(copy.deepcopy(base), "c")
    wrong = accelerated.RandLoraConfig(r=2, target_modules=targets)
    for add in (lambda: peft.get_peft_model(base, wrong), lambda: model.add_adapter("two", wrong)):
        with pytest.raises(ValueError, match=message):
            add()
    assert type(base.c) is nn.Linear and list(model.peft_config) == ["default"]


def test_a_model_that_is_one_layer():
    """Without a name no target can match it."""
    with pytest.raises(
        ValueError, match=r"the model is itself a linear layer; put it into an nn\.S"
    ):
        adapted(nn.Linear(8, 8), "c")


def test_a_layer_that_peft_adapted():
    model = adapted(nn.ModuleDict({"c": nn.Linear(8, 8)}), "c")
    with pytest.raises(
        TypeError, match="base_layer is adapted already .* model's add_adapter adds"
    ):
        RandLoraLinear(model.base_model.model.c)


def test_a_target_that_is_no_linear_layer_is_refused_before_any_is_adapted():
    base = nn.ModuleDict({"c": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})
    model = adapted(copy.deepcopy(base), "c")
    before = [*model.state_dict()]
    wrong = accelerated.RandLoraConfig(r=2, target_modules=["c", "norm"])
    for add in (lambda: peft.get_peft_model(base, wrong), lambda: model.add_adapter("two", wrong)):
        with pytest.raises(ValueError, match="Target module LayerNorm.* is not supported"):
            add()
    assert type(base.c) is nn.Linear and [*model.state_dict()] == before


@pytest.mark.parametrize("kind", [{"sparse": True}, {"basis": "hadamard"}, {}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_graph_for_any_number_of_tokens(kind, dtype):
    eager = made(projection_prng_key=17, **kind).to(dtype)  # not packed before it is traced
    fast = compiled(eager)
    for tokens in (7, 9, 30):
        x = torch.randn(2, tokens, 24).to(dtype)
        assert_steps_agree(fast, eager, x, 1e-5 if dtype == torch.float32 else 1e-2)
    assert graphs() == 2  # one for 7 tokens, one for any number
    assert runs_on_kernels(eager)


def test_other_bases_are_noticed():
    eager, other = (made(targets="a", projection_prng_key=key, sparse=True) for key in (0, 1))
    x = torch.randn(7, 24)
    fast = compiled(eager)
    before = fast(x)
    for name in ("randlora_A", "randlora_B"):
        bases = getattr(eager.base_model, name)
        bases["default"] = getattr(other.base_model, name)["default"].dense()
        after = fast(x)
        assert torch.equal(after, eager(x)) and not torch.equal(after, before)
        before = after


def test_an_exported_model(tmp_path):
    """It holds operators and plain tensors alone; test_compile.py loads such in a process."""
    model = made(projection_prng_key=23, sparse=True).eval()
    x = torch.randn(7, 24)
    program = torch.export.export(model.base_model.model, (x,), dynamic_shapes=({0: Dim.DYNAMIC},))
    assert all(type(t) is torch.Tensor for t in program.constants.values())
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for tokens in (1, 7, 90):
        row = torch.randn(tokens, 24)
        assert relative(loaded(row), model(row)) < 1e-5
    model(x).sum().backward()  # the bases that the export packed serve training
