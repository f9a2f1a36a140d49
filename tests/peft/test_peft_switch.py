"""randlora_ext.peft: packed bases, enable and disable, configuration, summary."""

import copy
import gc
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from peft_helpers import (
    RANDLORA,
    Deep,
    StockLinear,
    accelerated,
    basis_of,
    deep_config,
    layers,
    pair,
    peft,
    relative,
    runs_on_kernels,
)
from torch import nn

from randlora_ext import RandLoraLinear
from randlora_ext.peft import _require

pytestmark = pytest.mark.usefixtures("one_thread", "stock_peft")


def test_layers_of_one_shape_share_one_basis():
    accelerated.enable()
    model = peft.get_peft_model(Deep(), deep_config(5, sparse=True))
    a, b, c = layers(model)
    assert basis_of(a) is basis_of(c) and basis_of(a) is not basis_of(b)
    model.add_adapter("two", deep_config(5, sparse=True))
    assert a.basis_of("two", torch.device("cpu"))[0] is basis_of(a)


def test_changed_bases_are_noticed():
    stock, ours = pair(Deep(), lambda: deep_config(5, sparse=True))
    x = torch.randn(6, 24)
    ours(x)
    state = {
        key: value.flip(0) * 0.5 if "randlora_A" in key or "randlora_B" in key else value
        for key, value in stock.state_dict().items()
    }
    for model in (stock, ours):
        model.load_state_dict(state)  # written to
    assert relative(ours(x), stock(x)) < 1e-5
    B = stock.base_model.randlora_B["default"].flip(1)
    for model in (stock, ours):
        model.base_model.randlora_B["default"] = B.clone()  # replaced
    assert relative(ours(x), stock(x)) < 1e-5
    other = copy.deepcopy(stock.state_dict())
    for model in (stock, ours):
        model.load_state_dict({k: v.flip(0) for k, v in other.items()}, assign=True)
    assert relative(ours(x), stock(x)) < 1e-5
    for model in (stock, ours):
        model.double()  # cast
    assert relative(ours(x.double()), stock(x.double())) < 1e-10


def test_a_basis_serves_as_the_dense_tensor():
    accelerated.enable()
    model = peft.get_peft_model(Deep(), deep_config(5, sparse=True))
    A, dense = (
        model.base_model.randlora_A["default"],
        model.base_model.randlora_A["default"].dense(),
    )
    assert (A.shape, A.dtype, A.stride()) == (dense.shape, dense.dtype, dense.stride())
    assert A.tolist() == dense.tolist() and (A.numpy() == dense.numpy()).all()
    assert torch.equal(A * 2 + A.flip(0), dense * 2 + dense.flip(0))
    assert torch.equal(A[1:, 0, ::2], dense[1:, 0, ::2])
    assert torch.equal(pickle.loads(pickle.dumps(A)), dense)
    assert torch.equal(model.base_model.randlora_A.default, dense)
    with pytest.raises(RuntimeError, match="constant"):
        A.zero_()
    x = torch.randn(2, 24)
    before = model(x)
    assert torch.equal(model.share_memory()(x), before)
    model.base_model.randlora_A["default"] = dense.flip(0)
    assert torch.equal(model.base_model.randlora_A["default"], dense.flip(0))


def test_bases_go_with_their_model():
    accelerated.enable()
    gc.collect()
    model = peft.get_peft_model(Deep(), deep_config(5, sparse=True))
    model(torch.randn(2, 24))
    packed = weakref.ref(basis_of(layers(model)[0]))
    assert packed() is not None
    del model
    gc.collect()
    assert packed() is None


def test_too_small_bases_are_an_error():
    accelerated.enable()
    model = peft.get_peft_model(Deep(), deep_config(5, sparse=True))
    model.base_model.randlora_B["default"] = model.base_model.randlora_B["default"][:, :2]
    with pytest.raises(ValueError, match=r"randlora_B \(40, 2, 5\) are too small .*24 -> 40 .*r=5"):
        model(torch.randn(2, 24))


def test_uniform_bases_are_dense_and_say_so_once():
    stock, ours = pair(Deep(), lambda: deep_config(5))
    x = torch.randn(6, 24)
    with pytest.warns(
        UserWarning, match="multiply by dense bases: randlora_A is not ternary"
    ) as record:
        y = ours(x)
        ours(x)
    assert len(record) == 1
    assert relative(y, stock(x)) < 1e-6
    assert "3 layers by dense bases: randlora_A is not ternary" in accelerated.kernel_summary(ours)


def tables():
    mapping = peft.mapping
    return (
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING[RANDLORA],
        mapping.PEFT_TYPE_TO_TUNER_MAPPING[RANDLORA],
        peft.PeftModel.save_pretrained,
        peft.PeftModel.load_adapter,
    )


def test_enable_twice_and_disable():
    stock = tables()
    assert stock[:2] == (peft.RandLoraConfig, peft.tuners.randlora.RandLoraModel)
    assert {method.__module__ for method in stock[2:]} == {"peft.peft_model"}
    accelerated.disable()
    accelerated.enable()
    accelerated.enable()
    assert all(one is not other for one, other in zip(stock, tables(), strict=True))
    inside = peft.get_peft_model(Deep(), deep_config(5, sparse=True))
    accelerated.disable()
    assert tables() == stock
    outside = peft.get_peft_model(Deep(), deep_config(5, sparse=True))
    assert type(outside.base_model) is peft.tuners.randlora.RandLoraModel
    assert {type(layer) for layer in layers(outside)} == {StockLinear}
    inside.add_adapter("two", deep_config(5, sparse=True))
    assert runs_on_kernels(inside)


def test_inject_adapter_in_model():
    accelerated.enable()
    model = peft.inject_adapter_in_model(deep_config(5, sparse=True), Deep())
    assert runs_on_kernels(model)


@pytest.mark.parametrize(
    "options,error,message",
    [
        ({"density": 0.0}, ValueError, r"density must be None or in \(0, 1\], got 0\.0"),
        ({"density": 1.1}, ValueError, r"density .*1\.1"),
        ({"density": "0.1"}, TypeError, r"density .*'0\.1'"),
        ({"density": True}, TypeError, r"density .*True"),
        ({"density": 0.1, "sparse": True}, ValueError, r"density=0\.1 contradicts sparse=True"),
        ({"density": 1 / 3, "very_sparse": True}, ValueError, r"contradicts .*very_sparse=True"),
    ],
    ids=str,
)
def test_bad_density(options, error, message):
    accelerated.enable()
    with pytest.raises(error, match=message):
        deep_config(5, accelerated.RandLoraConfig, **options)


def test_density_before_enable_and_density_without_a_value_in_it():
    with pytest.raises(RuntimeError, match=r"density=0\.1 needs randlora_ext\.peft\.enable\(\)"):
        deep_config(5, accelerated.RandLoraConfig, density=0.1)
    accelerated.enable()
    with pytest.raises(ValueError, match=r"density=1e-07 leaves no non-zero in randlora_A"):
        peft.get_peft_model(Deep(), deep_config(5, accelerated.RandLoraConfig, density=1e-7))


@pytest.mark.parametrize(
    "installed,message", [(None, "not installed"), ("0.17.1", r"found 0\.17\.1")]
)
def test_missing_or_old_peft(monkeypatch, installed, message):
    if installed is None:
        monkeypatch.setitem(sys.modules, "peft", None)
    else:
        monkeypatch.setattr(peft, "__version__", installed)
    with pytest.raises(ImportError, match=rf"{message}.*pip install.*peft>=0\.18"):
        _require.check_peft()


WITHOUT_PEFT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"peft", "transformers", "accelerate", "bitsandbytes"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import torch, randlora_ext
model = torch.nn.Sequential(torch.nn.Linear(12, 20))
randlora_ext.apply_randlora(model, target_modules=["0"], r=4)
model(torch.randn(3, 12)).sum().backward()
assert model[0].randlora_lambda["default"].grad.any()
try:
    import randlora_ext.peft
except ImportError as error:
    print(error)
"""


def test_without_peft_the_core_works():
    run = subprocess.run([sys.executable, "-c", WITHOUT_PEFT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "not installed; install it with `pip install 'peft>=0.18'`" in run.stdout


def test_newer_peft_than_tested(monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.99.0.dev0")
    with pytest.warns(UserWarning, match=r"tested with PEFT 0\.18 to .*, found 0\.99\.0\.dev0"):
        _require.check_peft()


def test_kernel_summary(monkeypatch):
    monkeypatch.setenv("RANDLORA_PATH", "factored")
    stock, ours = pair(Deep(), lambda: deep_config(5, sparse=True))
    text = accelerated.kernel_summary(ours, tokens=64)
    assert "\n" not in text
    assert text.startswith("3 RandLoRA layers on randlora_ext's ")
    assert "at 64 tokens: 2x 24->40 r=5 density 0.3" in text and "1x 40->24" in text
    assert text.count("factored") == 2
    assert "3 layers on PEFT's own code: made without" in accelerated.kernel_summary(stock)
    assert accelerated.kernel_summary(nn.Linear(2, 2)) == "no RandLoRA layers"
    layer = RandLoraLinear(nn.Linear(2, 2), r=1)
    assert "each RandLoraLinear tells of its own" in accelerated.kernel_summary(layer)
