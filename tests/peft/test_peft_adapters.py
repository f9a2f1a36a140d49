"""randlora_ext.peft: several adapters, merging, copying, casting."""

import copy

import pytest
import torch
from layer_helpers import interrupts
from peft_helpers import (
    Deep,
    accelerated,
    assert_close,
    deep_config,
    layers,
    made,
    pair,
    peft,
    randomize,
    relative,
    run,
)

pytestmark = pytest.mark.usefixtures("one_thread", "stock_peft")


def test_two_adapters_as_stock():
    stock, ours = pair(Deep().double(), lambda: deep_config(5, sparse=True))
    x = torch.randn(6, 24, dtype=torch.float64)
    for model in (stock, ours):
        model.add_adapter("two", deep_config(5, sparse=True, randlora_alpha=100))
        randomize(model, seed=4)
    for names in ("default", "two", ["default", "two"]):
        for model in (stock, ours):
            model.base_model.set_adapter(names)
        assert_close(run(ours, x, ours(x)), run(stock, x, stock(x)), 1e-10)
    with ours.disable_adapter(), stock.disable_adapter():
        assert torch.equal(ours(x), stock(x))
    ours.delete_adapter("default")
    assert relative(ours(x), stock(x)) > 1e-3
    stock.delete_adapter("default")
    assert relative(ours(x), stock(x)) < 1e-10


@pytest.mark.parametrize("r", [3, 11])
@pytest.mark.parametrize(
    "kind", [{"sparse": True}, {"density": 0.2}, {"basis": "hadamard"}, {}], ids=str
)
def test_an_adapter_of_another_rank_or_density_is_what_it_is_alone(tmp_path, r, kind):
    accelerated.enable()

    def second():
        return deep_config(r, accelerated.RandLoraConfig, **kind)

    model = peft.get_peft_model(Deep(), deep_config(5, sparse=True))
    model.add_adapter("two", second())
    model.add_adapter("three", second())
    randomize(model)
    A = model.base_model.randlora_A
    first, two, three = (getattr(A[n], "signs", A[n]) for n in ("default", "two", "three"))
    assert two is three and two is not first
    x = torch.randn(6, 24)
    outputs = {}
    for name in ("default", "two"):
        model.set_adapter(name)
        outputs[name] = model(x)
    model.base_model.set_adapter(["default", "two"])
    assert model(x).isfinite().all()
    model.save_pretrained(tmp_path)
    alone = peft.PeftModel.from_pretrained(Deep(), tmp_path / "two")
    assert torch.equal(alone(x), outputs["two"])
    both = peft.PeftModel.from_pretrained(Deep(), tmp_path)
    both.load_adapter(tmp_path / "two", "two")
    for name, wanted in outputs.items():
        both.set_adapter(name)
        assert torch.equal(both(x), wanted)


def test_adapters_of_files_share_one_basis(tmp_path):
    stock, ours = pair(Deep(), lambda: deep_config(5, sparse=True))
    ours.save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(Deep(), tmp_path)
    model.load_adapter(tmp_path, "two")
    stock.add_adapter("two", deep_config(5, sparse=True))
    for either in (model, accelerated.accelerate(stock)):
        A, B = either.base_model.randlora_A, either.base_model.randlora_B
        assert A["default"].signs is A["two"].signs and B["default"].signs is B["two"].signs


@pytest.mark.parametrize("safe", [True, False])
def test_merge_and_unmerge(safe):
    stock, ours = pair(Deep(), lambda: deep_config(5, sparse=True))
    x = torch.randn(6, 24)
    before, weight = ours(x), layers(ours)[0].weight.clone()
    for model in (stock, ours):
        model.merge_adapter(safe_merge=safe)
    assert all(layer.merged for layer in layers(ours))
    assert relative(ours(x), before) < 1e-5
    for mine, theirs in zip(layers(ours), layers(stock), strict=True):
        assert relative(mine.weight, theirs.weight) < 1e-6
    ours.unmerge_adapter()
    torch.testing.assert_close(layers(ours)[0].weight, weight)
    assert relative(ours(x), before) < 1e-5
    ours.merge_adapter()
    with ours.disable_adapter():  # PEFT unmerges
        assert relative(ours(x), Deep()(x)) < 1e-5
    plain = ours.merge_and_unload()
    assert not layers(plain) and relative(plain(x), before) < 1e-5


@pytest.mark.parametrize("names", [["two"], ["default", "two"], ["two", "default"], None], ids=str)
def test_merge_of_chosen_adapters(names):
    stock, ours = pair(Deep(), lambda: deep_config(5, sparse=True))
    for model in (stock, ours):
        model.add_adapter("two", deep_config(5, sparse=True, randlora_alpha=100))
        randomize(model, seed=4)
        model.merge_adapter(adapter_names=names)
    x = torch.randn(6, 24)
    for mine, theirs in zip(layers(ours), layers(stock), strict=True):
        assert mine.merged_adapters == theirs.merged_adapters == (names or ["default"])
        assert relative(mine.weight, theirs.weight) < 1e-6
    assert relative(ours(x), stock(x)) < 1e-5
    for model in (stock, ours):
        model.unmerge_adapter()
    assert relative(ours(x), stock(x)) < 1e-5
    plain, wanted = (model.merge_and_unload(adapter_names=names) for model in (ours, stock))
    assert relative(plain(x), wanted(x)) < 1e-5


def test_safe_merge_refuses_nan():
    model = made(sparse=True)
    with torch.no_grad():
        layers(model)[0].randlora_lambda["default"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)
    assert not layers(model)[0].merged and layers(model)[0].weight.isfinite().all()


@pytest.mark.parametrize("method", ["merge", "unmerge"])
def test_weight_and_state_agree_after_ctrl_c(method):
    layer = layers(made(sparse=True))[0]
    weight = layer.get_base_layer().weight
    states = {False: weight.clone(), True: weight + layer.get_delta_weight("default")}

    def start():
        with torch.no_grad():
            weight.copy_(states[method == "unmerge"])
        layer.merged_adapters = ["default"] if method == "unmerge" else []

    start()
    ends = set()
    for _ in interrupts(getattr(layer, method)):
        ends.add(layer.merged)
        torch.testing.assert_close(weight, states[layer.merged])
        start()
    assert ends == {False, True}


def test_copy_pickle_and_cast(tmp_path):
    model = made(sparse=True)
    x = torch.randn(6, 24)
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(x), y)
    double = model.double()
    assert double(x.double()).dtype == torch.float64
    assert relative(double(x.double()), y) < 1e-5
    half = model.to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert relative(half(x.bfloat16()), y) < 0.05
