"""randlora_ext.peft: several adapters, and merging."""

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


OTHERS = [
    (3, {"sparse": True}),
    (11, {}),
    (5, {"density": 0.2, "projection_prng_key": 3}),
    (3, {"basis": "hadamard", "projection_prng_key": 2}),
]


@pytest.mark.parametrize("r, kind", OTHERS, ids=str)
def test_an_adapter_of_another_rank_key_or_kind_is_what_it_is_alone(tmp_path, r, kind, x):
    """Stock PEFT wants one key and one save_projection for all; it still does for its own bases."""
    model = made(sparse=True, save_projection="projection_prng_key" not in kind)
    for name in ("two", "three"):
        model.add_adapter(name, config(r, accelerated.RandLoraConfig, **kind))
    randomize(model)
    device = torch.device("cpu")
    first, two, three = (layers(model)[0].basis_of(n, device) for n in ("default", "two", "three"))
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
    with pytest.raises(ValueError, match="PRNG initialisation key must be the same"):
        model.add_adapter("four", config(5, sparse=True, projection_prng_key=9))


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
