"""randlora_ext.peft: the rest of PEFT's interface, with stock PEFT as the oracle."""

import copy
import json
import shutil

import pytest
import torch
from cli_helpers import llama
from peft_helpers import (
    Deep,
    Wide,
    accelerated,
    adapted,
    assert_close,
    config,
    edit_config,
    layers,
    made,
    pair,
    peft,
    randomize,
    relative,
    run,
)
from safetensors.torch import load_file
from torch import nn


def status(value):
    """As plain values, without the names of our classes."""
    text = json.dumps(value, default=vars, sort_keys=True)
    for name in ("Linear", "RandLoraModel"):
        text = text.replace(f"Accelerated{name}", name)
    return text


def test_what_peft_tells_of_a_model():
    stock, ours = pair(Deep(), lambda: config(5, sparse=True))
    for model in (stock, ours):
        model.add_adapter("two", config(5, sparse=True))
    for _ in range(2):
        assert ours.get_nb_trainable_parameters() == stock.get_nb_trainable_parameters()
        assert status(ours.get_layer_status()) == status(stock.get_layer_status())
        assert status(ours.get_model_status()) == status(stock.get_model_status())
        assert ours.active_adapters == stock.active_adapters
        assert [n for n, _ in ours.named_parameters()] == [n for n, _ in stock.named_parameters()]
        for model in (stock, ours):
            model.set_adapter("two")
            model.merge_adapter(["default"])


def test_injected_adapters(x):
    """Without a PeftModel, as diffusers and transformers use PEFT. Bases are written once: by ours
    under the first layer, by PEFT after 0.21.2 (huggingface/peft#3714) under any.
    """
    states, outputs = {}, {}
    for backend in ("stock", "ours"):
        accelerated.enable() if backend == "ours" else accelerated.disable()
        model = randomize(peft.inject_adapter_in_model(config(5, sparse=True), Deep()))
        states[backend] = peft.get_peft_model_state_dict(model)
        outputs[backend] = model(x)
    assert relative(outputs["ours"], outputs["stock"]) < 1e-6
    counts = {k: sum(key.endswith("randlora_A") for key in v) for k, v in states.items()}
    assert counts["ours"] == 1
    for layer in "abc":
        drop = tuple(
            f"{name}.randlora_{basis}" for name in "abc" for basis in "AB" if name != layer
        )
        states[layer] = {k: v for k, v in states["stock"].items() if k not in drop}
        outputs[layer] = outputs["stock"]
    for writer, state in states.items():
        for reader in ("stock", "ours"):
            accelerated.enable() if reader == "ours" else accelerated.disable()
            other = config(5, sparse=True, projection_prng_key=9)  # other bases at first
            model = peft.inject_adapter_in_model(other, Deep())
            peft.set_peft_model_state_dict(model, state)
            assert relative(model(x), outputs[writer]) < 1e-6


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

    def chosen():
        return peft.RandLoraConfig(r=8, sparse=True, target_modules=targets)

    names, outputs = [], []
    for enabled in (False, True):
        accelerated.enable() if enabled else accelerated.disable()
        model = peft.get_peft_model(copy.deepcopy(base), chosen())
        model.add_adapter("two", chosen())
        model.base_model.set_adapter(["default", "two"])
        outputs.append(randomize(model)(tokens).logits)
        injected = peft.inject_adapter_in_model(chosen(), copy.deepcopy(base))
        injected = peft.inject_adapter_in_model(chosen(), injected, adapter_name="two")
        names.append(
            [n for m in (model, injected) for n, _ in m.named_parameters() if "randlora_" in n]
        )
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
    edit_config(tmp_path, projection_prng_key=9)
    loaded = llama()
    loaded.load_adapter(tmp_path)
    for model in (loaded, peft.PeftModel.from_pretrained(llama(), tmp_path)):
        assert relative(model(tokens).logits, wanted) < 1e-6
    for seed in (1, 2):
        adapted(llama(), ["q_proj"], 4, basis="hadamard", projection_prng_key=seed).save_pretrained(
            tmp_path / str(seed)
        )
    shutil.copy(tmp_path / "2" / "adapter_config.json", tmp_path / "1")  # a torn save
    with pytest.raises(ValueError, match="does not belong to the adapter_model"):
        llama().load_adapter(tmp_path / "1")


@pytest.mark.parametrize("kind", [{"sparse": True}, {}], ids=["packed", "uniform"])
@pytest.mark.parametrize("autocast", [True, False])
def test_dtypes_of_a_bf16_model(autocast, kind):
    options = {"autocast_adapter_dtype": autocast}
    stock, ours = pair(Deep().bfloat16(), lambda: config(5, **kind), **options)
    for (name, mine), (other, theirs) in zip(
        ours.named_parameters(), stock.named_parameters(), strict=True
    ):
        assert (name, mine.dtype) == (other, theirs.dtype)
    for name in ("randlora_A", "randlora_B"):
        mine, theirs = (getattr(layers(m)[0], name)["default"] for m in (ours, stock))
        assert mine.dtype is theirs.dtype is (torch.float32 if autocast else torch.bfloat16)
        assert torch.equal(mine + 0, theirs)
    x = torch.randn(6, 24).bfloat16()
    results = [run(model, x, torch.ones(6, 40).bfloat16()) for model in (ours, stock)]
    assert_close(*results, 0.03)


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


def test_adapters_come_and_go(x):
    model = made(sparse=True)
    model.add_adapter("two", config(3, sparse=True))
    model.delete_adapter("default")
    assert list(model.base_model.randlora_A) == ["two"]
    model.add_adapter("default", config(5, sparse=True))
    model.set_adapter("default")
    model.delete_adapter("two")
    assert torch.equal(randomize(model)(x), made(sparse=True)(x))
    with torch.no_grad():
        bare = model.unload()(x)
    assert torch.equal(bare, Deep()(x))


@pytest.mark.parametrize("targets", ["q_proj", ["q_proj", "block"]], ids=str)
def test_wrong_targets_list_the_layers_that_exist(targets):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.block = nn.Embedding(9, 8), nn.ModuleList([nn.Linear(8, 8)] * 2)

    message = r"target_modules .* matches no linear layer of Model; .* called \['block.0'\]"
    base, model = Model(), adapted(Model(), "0")
    wrong = accelerated.RandLoraConfig(r=2, target_modules=targets)
    for add in (lambda: peft.get_peft_model(base, wrong), lambda: model.add_adapter("two", wrong)):
        with pytest.raises(ValueError, match=message):
            add()
    assert type(base.block[0]) is nn.Linear
    assert list(model.peft_config) == ["default"]
