"""randlora_ext.peft: dense bases, PEFT's default; test_peft.py compares them in float32 and 64."""

import warnings

import pytest
import torch
from peft_helpers import (
    Deep,
    accelerated,
    assert_close,
    basis_of,
    deep_config,
    inputs,
    layers,
    made,
    pair,
    peft,
    relative,
    run,
)

pytestmark = pytest.mark.usefixtures("one_thread", "stock_peft")


PRODUCTS = {"factored": torch.bfloat16, "delta": torch.float16, "merged": torch.bfloat16}


@pytest.mark.parametrize("path,dtype", PRODUCTS.items(), ids=str)
def test_products_in_16_bits_or_as_stock(monkeypatch, path, dtype):
    """Adapters, gradients and files stay float32; errors are those of 16-bit activations."""
    monkeypatch.setenv("RANDLORA_PATH", path)
    stock, ours = pair(Deep().to(dtype), lambda: deep_config(5))
    # The same 16-bit weights and activations, all else exact.
    exact, _ = pair(Deep().to(dtype).double(), lambda: deep_config(5))
    exact.load_state_dict({k: v.double() for k, v in stock.state_dict().items()})
    x, dy = inputs(24, 40, dtype)
    wanted = run(exact.double(), x.double(), dy.double())
    theirs, mine = run(stock, x, dy), run(ours, x, dy)
    eps = torch.finfo(dtype).eps
    for ours_is, theirs_is, value in zip(mine, theirs, wanted, strict=True):
        assert ours_is.dtype == theirs_is.dtype
        # stock rounds only between layers
        assert relative(ours_is, value) <= 2 * relative(theirs_is, value) + 2 * eps
    accelerated.enable(float32_products=True)
    try:
        assert_close(run(ours, x, dy), theirs, eps)
    finally:
        accelerated.enable()
    saved = {v.dtype for k, v in ours.state_dict().items() if "randlora" in k}
    assert saved == {torch.float32}


def test_layers_multiply_by_the_tensors_of_the_model():
    model = made()
    a, b, c = (basis_of(layer) for layer in layers(model))
    A, B = (getattr(model.base_model, n)["default"] for n in ("randlora_A", "randlora_B"))
    assert a is c
    for basis in (a, b):
        assert basis.kind == "dense"
        assert [t.data_ptr() for t in basis.packed()] == [A.data_ptr(), B.data_ptr()]
    bases = accelerated.accelerate(peft.get_peft_model(Deep(), deep_config(5))).base_model
    assert bases.randlora_B["default"].dtype == torch.float32


def test_what_is_written_to_the_bases_is_noticed():
    model = made(base=lambda: Deep().bfloat16())
    x = torch.randn(6, 24, dtype=torch.bfloat16)
    before = model(x)
    with torch.no_grad():
        model.base_model.randlora_B["default"].mul_(2)  # there is a copy in 16 bits
    assert relative(model(x), before) > 0.1


@pytest.mark.parametrize(
    "kind,compiled",
    [({"sparse": True}, False), ({"basis": "independent"}, True), ({}, False)],
    ids=str,
)
def test_a_device_without_kernels(monkeypatch, kind, compiled):
    """Ternary bases are multiplied as dense ones, and one warning says so."""
    x, dy = inputs(24, 40)
    served = made(**kind)
    want = run(served, x, dy)
    delta = layers(served)[0].get_delta_weight("default")
    for module in ("peft.layer", "nn.adapted_layer"):
        monkeypatch.setattr(f"randlora_ext.{module}.serve", lambda device_type: False)
    model = made(**kind)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in (model, torch.compile(model, backend="aot_eager") if compiled else model):
            assert_close(run(call, x, dy), want, 1e-5)
        assert relative(layers(model)[0].get_delta_weight("default"), delta) < 1e-6
    told = [each for each in caught if "no randlora_ext kernels for device type" in str(each)]
    assert len(told) == (1 if kind else 0)
    assert {layer.basis_of("default", x.device).kind for layer in layers(model)} == {"dense"}
    assert "3 layers by plain torch on dense bases: " in accelerated.kernel_summary(model)
    assert "; default: plain torch on dense bases\n" in repr(model)
