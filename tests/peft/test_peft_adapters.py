"""randlora_ext.peft: several adapters, merging, copying, casting."""

import copy

import pytest
import torch
from peft_helpers import (
    Deep,
    accelerated,
    assert_close,
    config,
    layers,
    made,
    opened,
    pair,
    randomize,
    relative,
    run,
)


def pair_of_two_adapters(kind, base=Deep):
    """(stock PEFT's model, ours) with adapters "default" and "two"."""
    models = pair(base(), lambda: config(5, **kind))
    for model in models:
        model.add_adapter("two", config(5, **kind, randlora_alpha=100))
        randomize(model, seed=4)
    return models


@pytest.mark.parametrize("kind", [{"sparse": True}, {}], ids=str)
def test_two_adapters_as_stock(kind):
    stock, ours = pair_of_two_adapters(kind, lambda: Deep().double())
    tolerance = 1e-10 if kind else 1e-6  # uniform bases are stored in 16 bits
    x = torch.randn(6, 24, dtype=torch.float64)
    for names in ("default", "two", ["default", "two"]):
        for model in (stock, ours):
            model.base_model.set_adapter(names)
        assert_close(run(ours, x, ours(x)), run(stock, x, stock(x)), tolerance)
    with ours.disable_adapter(), stock.disable_adapter():
        assert torch.equal(ours(x), stock(x))
    ours.delete_adapter("default")
    assert relative(ours(x), stock(x)) > 1e-3
    stock.delete_adapter("default")
    assert relative(ours(x), stock(x)) < tolerance


@pytest.mark.parametrize(
    "r, kind", [(3, {"sparse": True}), (11, {}), (11, {"density": 0.2}), (3, {"basis": "hadamard"})]
)
def test_an_adapter_of_another_rank_or_density_is_what_it_is_alone(tmp_path, r, kind, x):
    model = made(sparse=True)
    for name in ("two", "three"):
        model.add_adapter(name, config(r, accelerated.RandLoraConfig, **kind))
    randomize(model)
    A = model.base_model.randlora_A
    first, two, three = (getattr(A[n], "signs", A[n]) for n in ("default", "two", "three"))
    assert two is three and two is not first
    outputs = {}
    for name in ("default", "two"):
        model.set_adapter(name)
        outputs[name] = model(x)
    model.base_model.set_adapter(["default", "two"])
    assert model(x).isfinite().all()
    model.save_pretrained(tmp_path)
    assert torch.equal(opened(tmp_path / "two")(x), outputs["two"])
    both = opened(tmp_path)
    both.load_adapter(tmp_path / "two", "two")
    for name, wanted in outputs.items():
        both.set_adapter(name)
        assert torch.equal(both(x), wanted)


def test_adapters_of_files_share_one_basis(tmp_path):
    made(sparse=True).save_pretrained(tmp_path)
    model = opened(tmp_path)
    model.load_adapter(tmp_path, "two")
    stock, _ = pair_of_two_adapters({"sparse": True})
    for either in (model, accelerated.accelerate(stock)):
        A, B = either.base_model.randlora_A, either.base_model.randlora_B
        assert A["default"].signs is A["two"].signs and B["default"].signs is B["two"].signs


@pytest.mark.parametrize("safe, kind", [(True, {"sparse": True}), (False, {})])
@pytest.mark.parametrize("names", [["two"], ["default", "two"], ["two", "default"], None], ids=str)
def test_merging_as_stock(names, kind, safe, x):
    stock, ours = pair_of_two_adapters(kind)
    ours.base_model.set_adapter(names or ["default"])
    before, weight = ours(x), layers(ours)[0].weight.clone()
    for model in (stock, ours):
        model.merge_adapter(adapter_names=names, safe_merge=safe)
    for mine, theirs in zip(layers(ours), layers(stock), strict=True):
        assert mine.merged_adapters == theirs.merged_adapters == (names or ["default"])
        assert mine.merged and relative(mine.weight, theirs.weight) < 1e-6
    assert relative(ours(x), before) < 1e-5 and relative(ours(x), stock(x)) < 1e-5
    for model in (stock, ours):
        model.unmerge_adapter()
    assert torch.equal(layers(ours)[0].weight, weight) and relative(ours(x), before) < 1e-5
    ours.merge_adapter(adapter_names=names)
    with ours.disable_adapter():  # PEFT unmerges
        assert relative(ours(x), Deep()(x)) < 1e-5
    plain, wanted = (model.merge_and_unload(adapter_names=names) for model in (ours, stock))
    assert not layers(plain) and relative(plain(x), wanted(x)) < 1e-5


def test_safe_merge_refuses_nan():
    model = made(sparse=True)
    with torch.no_grad():
        layers(model)[0].randlora_lambda["default"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)
    assert not layers(model)[0].merged and layers(model)[0].weight.isfinite().all()


def test_copy_pickle_and_cast(tmp_path, x):
    model = made(sparse=True)
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(x), y)
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.bfloat16, 0.05)):
        cast = model.to(dtype)(x.to(dtype))
        assert cast.dtype == dtype and relative(cast, y) < tolerance
