"""randlora_ext.peft: adapter_names, one adapter per row of a batch (stock PEFT has it for LoRA)."""

import pytest
import torch
from cli_helpers import llama
from peft_helpers import Headed, adapted, config, made, randomize, shake, t5


def adapters(model, make, names=("two", "three")):
    """A model in eval mode with "default" and more adapters, all of other numbers."""
    for i, name in enumerate(names):
        model.add_adapter(name, make(i))
    return randomize(model).eval()


def row_by_row(model, names, rows, call=None):
    """Each row alone with its adapter active, by the model or by `call`."""
    call, results = call or model, []
    for name, row in zip(names, rows, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                results.append(call(row[None]))
        else:
            model.set_adapter(name)
            results.append(call(row[None]))
    return torch.cat(results)


@pytest.mark.parametrize(
    "kind, shape",
    [({"sparse": True}, (6, 24)), ({"basis": "hadamard"}, (6, 7, 24)), ({}, (6, 7, 24))],
)
def test_each_row_is_that_of_its_adapter(kind, shape):
    model = adapters(made(**kind), lambda i: config((5, 3)[i], sparse=True))
    names = ["two", "default", "__base__", "three", "two", "__base__"]
    x = torch.randn(shape)
    mixed = model(x, adapter_names=names)
    torch.testing.assert_close(mixed, row_by_row(model, names, x))
    # and the next call is an ordinary one
    model.set_adapter("two")
    assert not torch.allclose(model(x), mixed)


def test_adapters_of_other_layers_and_gradients():
    model = made(targets="ab", sparse=True)
    adapters(model, lambda i: config(5, targets=["c"], sparse=True), ["two"])
    names = ["two", "default", "two"]
    x = torch.randn(3, 24, requires_grad=True)
    got = torch.autograd.grad(model(x, adapter_names=names).square().sum(), x)[0]
    wanted = torch.autograd.grad(row_by_row(model, names, x).square().sum(), x)[0]
    torch.testing.assert_close(got, wanted)


def test_modules_to_save_follow():
    options = {"sparse": True, "modules_to_save": ["head"]}
    model = made(base=Headed, **options)
    adapters(model, lambda i: config(5, **options), ["two"])
    for name in ("default", "two"):
        model.set_adapter(name)
        shake(model)
    names = ["default", "two", "__base__"]
    x = torch.randn(3, 24)
    torch.testing.assert_close(model(x, adapter_names=names), row_by_row(model, names, x))


def test_modules_to_save_of_one_adapter_alone():
    model = made(base=Headed, sparse=True, modules_to_save=["head"])
    adapters(model, lambda i: config(5, sparse=True), ["two"])
    shake(model)
    names = ["default", "two", "__base__"]
    x = torch.randn(3, 24)
    want = row_by_row(model, names, x)
    for active in ("default", "two"):  # whose head does not matter
        model.set_adapter(active)
        torch.testing.assert_close(model(x, adapter_names=names), want)


def test_errors():
    model = adapters(made(sparse=True), lambda _: config(5))
    x = torch.randn(2, 24)
    known = r"\['default', 'three', 'two'\]"
    with pytest.raises(ValueError, match=rf"unknown \['tow'\]; known are {known}"):
        model(x, adapter_names=["tow", "default"])
    with pytest.raises(ValueError, match="one name per input, got 3 for 2"):
        model(x, adapter_names=["two"] * 3)
    with pytest.raises(ValueError, match="training mode"):
        model.train()(x, adapter_names=["two"] * 2)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="needs unmerged adapters"):
        model(x, adapter_names=["two"] * 2)


def small_llama():
    return llama(), {"targets": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize(
    "make, options",
    [
        (small_llama, {}),
        (small_llama, {"num_beams": 4, "num_return_sequences": 2}),
        (t5, {"num_beams": 3}),
    ],
)
def test_generation(make, options):
    base, chosen = make()
    model = adapted(base, r=8, sparse=True, **chosen)
    adapters(model, lambda _: config(8, sparse=True, **chosen))
    randomize(model, 1, size=30)  # far from each other, so that the adapters answer differently
    names = ["two", "__base__", "default", "three"]
    tokens = torch.randint(3, 50, (4, 6))
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **options}
    mixed = model.generate(input_ids=tokens, adapter_names=names, **options)
    alone = row_by_row(model, names, tokens, lambda row: model.generate(input_ids=row, **options))
    assert mixed.tolist() == alone.tolist()
    assert len(set(map(tuple, mixed.tolist()))) > len(names) // 2
    if "num_beams" in options:  # by a GenerationConfig, too
        from transformers import GenerationConfig

        given = GenerationConfig(**options, decoder_start_token_id=0, pad_token_id=0)
        again = model.generate(input_ids=tokens, adapter_names=names, generation_config=given)
        assert again.tolist() == mixed.tolist()
