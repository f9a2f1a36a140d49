"""randlora_ext.peft.accelerate: a model of stock PEFT changes over in place, at any moment."""

import copy

import pytest
import torch
from peft_helpers import (
    Deep,
    accelerated,
    assert_close,
    deep_config,
    layers,
    peft,
    randomize,
    relative,
    run,
    runs_on_kernels,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread", "stock_peft"),
    pytest.mark.filterwarnings("ignore:RandLoRA layers of this model multiply by dense"),
]
KINDS = {"sparse": {"sparse": True}, "very_sparse": {"very_sparse": True}, "uniform": {}}


def stock(base=Deep, **options):
    return randomize(peft.get_peft_model(base(), deep_config(5, **options)))


def train(model, optimizer, steps):
    generator = torch.Generator().manual_seed(2)
    losses = []
    for _ in range(steps):
        x = torch.randn(6, 24, generator=generator)
        loss = (model(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_in_the_middle_of_training(kind):
    """Two steps of stock PEFT and then three of ours are five of stock PEFT."""
    model, control = stock(**kind), stock(**kind)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (model, control)]
    assert train(model, optimizers[0], 2) == train(control, optimizers[1], 2)
    parameters = dict(model.named_parameters())
    state = optimizers[0].state
    moments = {id(p): state[p]["exp_avg"].clone() for p in state}
    assert accelerated.accelerate(model) is model
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is parameters[name] for name in after)
    assert moments and all(torch.equal(state[p]["exp_avg"], moments[id(p)]) for p in state)
    losses = [train(m, o, 3) for m, o in zip((model, control), optimizers, strict=True)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for mine, theirs in zip(model.parameters(), control.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert accelerated.accelerate(model) is model  # again: nothing changes
    assert all(p is parameters[name] for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_several_adapters_and_dtypes(dtype):
    model = stock(lambda: Deep().to(dtype), sparse=True)
    model.add_adapter("two", deep_config(5, sparse=True, randlora_alpha=100))
    model.base_model.set_adapter(["default", "two"])
    randomize(model, 1)
    x, dy = torch.randn(6, 24).to(dtype), torch.randn(6, 40).to(dtype)
    wanted = run(model, x, dy)
    accelerated.accelerate(model)
    assert runs_on_kernels(model)
    assert_close(
        run(model, x, dy), wanted, {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 0.02)
    )


def test_a_merged_model():
    model = stock(sparse=True)
    x = torch.randn(6, 24)
    weight, before = layers(model)[0].weight.clone(), model(x)
    model.merge_adapter()
    accelerated.accelerate(model)
    assert relative(model(x), before) < 1e-5
    model.unmerge_adapter()
    torch.testing.assert_close(layers(model)[0].weight, weight)
    assert relative(model(x), before) < 1e-5


def test_an_injected_model():
    model = randomize(peft.inject_adapter_in_model(deep_config(5, sparse=True), Deep()))
    x, dy = torch.randn(6, 24), torch.randn(6, 40)
    wanted = run(model, x, dy)
    accelerated.accelerate(model)
    assert runs_on_kernels(model)
    assert_close(run(model, x, dy), wanted, 1e-5)


def test_files_are_those_of_stock(tmp_path):
    model = stock(sparse=True)
    x = torch.randn(6, 24)
    wanted = model(x)
    accelerated.accelerate(copy.deepcopy(model)).save_pretrained(tmp_path)
    assert relative(peft.PeftModel.from_pretrained(Deep(), tmp_path)(x), wanted) < 1e-6


def test_no_randlora_layer():
    fourier = peft.get_peft_model(Deep(), peft.FourierFTConfig(n_frequency=9, target_modules=["a"]))
    for model in (Deep(), fourier):
        with pytest.raises(ValueError, match="holds no RandLoRA layer of PEFT"):
            accelerated.accelerate(model)
