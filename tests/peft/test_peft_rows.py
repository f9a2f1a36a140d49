"""randlora_ext.peft: one adapter per row of a batch (`adapter_names`)."""

import pytest
import torch
from compile_helpers import compiled
from compile_helpers import fresh_dynamo as fresh_dynamo
from peft_helpers import (
    Headed,
    adapted,
    config,
    made,
    randomize,
    shake,
    small_llama,
    t5,
)
from transformers import GenerationConfig


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


ROWS = ["two", "default", "__base__", "three", "two", "__base__"]


@pytest.mark.parametrize(
    "options, shape",
    [({"sparse": True}, (6, 24)), ({"basis": "hadamard"}, (6, 7, 24)), ({}, (6, 7, 24))],
)
def test_each_row_is_that_of_its_adapter(options, shape):
    model = adapters(made(**options), lambda i: config((5, 3)[i], sparse=True))
    x = torch.randn(shape)
    torch.testing.assert_close(model(x, adapter_names=ROWS), row_by_row(model, ROWS, x))


@pytest.mark.parametrize("options", [{"basis": "hadamard"}, {}], ids=str)
def test_rows_under_autocast_have_the_dtype_of_their_input(options):
    model = adapters(made(**options), lambda i: config((5, 3)[i]))
    x = torch.randn(6, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x, adapter_names=ROWS).dtype is model(x).dtype is torch.float32


def test_the_call_after_a_mixed_batch_is_an_ordinary_one():
    model = adapters(made(sparse=True), lambda i: config((5, 3)[i], sparse=True))
    x = torch.randn(6, 24)
    model.set_adapter("two")
    before = model(x)
    assert not torch.allclose(model(x, adapter_names=ROWS), before)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_compiled_code_takes_the_rows_of_each_call(order, fresh_dynamo):
    model = adapters(made(basis="hadamard"), lambda i: config((5, 3)[i], sparse=True))
    x, batches = torch.randn(6, 24), [None, ROWS, ROWS[::-1]]
    want = [model(x, adapter_names=names) for names in batches]
    inner = model.base_model.model
    inner.forward = compiled(inner.forward)
    for k in (*order, *order):
        torch.testing.assert_close(model(x, adapter_names=batches[k]), want[k])


def test_gradients_of_rows_whose_adapters_have_other_layers():
    model = made(targets="ab", sparse=True)
    adapters(model, lambda i: config(5, targets=["c"], sparse=True), ["two"])
    names = ["two", "default", "two"]
    x = torch.randn(3, 24, requires_grad=True)
    got = torch.autograd.grad(model(x, adapter_names=names).square().sum(), x)[0]
    wanted = torch.autograd.grad(row_by_row(model, names, x).square().sum(), x)[0]
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("second", [{"modules_to_save": ["head"]}, {}], ids=["both", "one"])
def test_modules_to_save_follow(second):
    model = made(base=Headed, sparse=True, modules_to_save=["head"])
    adapters(model, lambda i: config(5, sparse=True, **second), ["two"])
    names, x = ["default", "two", "__base__"], torch.randn(3, 24)
    for name in names[:2]:
        model.set_adapter(name)
        shake(model)
    want = row_by_row(model, names, x)
    for active in ("default", "two"):  # whose head does not matter
        model.set_adapter(active)
        torch.testing.assert_close(model(x, adapter_names=names), want)


NAMES = {
    "unknown": (["tow", "default"], r"unknown \['tow'\]; known are \['default', 'three', 'two'\]"),
    "too many": (["two"] * 3, "one name per input, got 3 for 2"),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_that_do_not_fit(case):
    names, message = NAMES[case]
    model = adapters(made(sparse=True), lambda _: config(5))
    with pytest.raises(ValueError, match=message):
        model(torch.randn(2, 24), adapter_names=names)


STATES = {
    "training": (lambda model: model.train(), "training mode"),
    "merged": (lambda model: model.merge_adapter(), "needs unmerged adapters"),
}


@pytest.mark.parametrize("case", STATES)
def test_states_in_which_no_batch_is_mixed(case):
    change, message = STATES[case]
    model = adapters(made(sparse=True), lambda _: config(5))
    change(model)
    with pytest.raises(ValueError, match=message):
        model(torch.randn(2, 24), adapter_names=["two"] * 2)


BEAMS = {"num_beams": 4, "num_return_sequences": 2}


GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
FOUR = ["two", "__base__", "default", "three"]


def generating(make):
    """A model of three adapters that answer differently, and prompts."""
    base, chosen = make()
    model = adapted(base, r=8, sparse=True, **chosen)
    adapters(model, lambda _: config(8, sparse=True, **chosen))
    return randomize(model, 1, size=30), torch.randint(3, 50, (4, 6))


@pytest.mark.parametrize("make, options", [(small_llama, {}), (small_llama, BEAMS), (t5, BEAMS)])
def test_generation(make, options):
    model, tokens = generating(make)
    options = GREEDY | options
    mixed = model.generate(input_ids=tokens, adapter_names=FOUR, **options)
    alone = row_by_row(model, FOUR, tokens, lambda row: model.generate(input_ids=row, **options))
    assert mixed.tolist() == alone.tolist()
    assert len(set(map(tuple, mixed.tolist()))) > len(FOUR) // 2


@pytest.mark.parametrize("make", [small_llama, t5])
def test_beams_of_a_generation_config(make):
    model, tokens = generating(make)
    options = GREEDY | BEAMS
    want = model.generate(input_ids=tokens, adapter_names=FOUR, **options)
    given = GenerationConfig(**options, decoder_start_token_id=0, pad_token_id=0)
    got = model.generate(input_ids=tokens, adapter_names=FOUR, generation_config=given)
    assert got.tolist() == want.tolist()
    model.get_base_model().generation_config.update(**options)  # as translation models have it
    assert model.generate(input_ids=tokens, adapter_names=FOUR).tolist() == want.tolist()
    silent = GenerationConfig(max_new_tokens=5)
    got = model.generate(input_ids=tokens, adapter_names=FOUR, generation_config=silent)
    assert got.tolist() == want.tolist()
