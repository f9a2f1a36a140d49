"""randlora_ext.peft: generated bases, and files that do not fit."""

import json
import math
import struct

import pytest
import torch
from peft_helpers import (
    Deep,
    StockLinear,
    accelerated,
    assert_close,
    basis_of,
    config,
    deep_config,
    inputs,
    layers,
    peft,
    randomize,
    relative,
    run,
    runs_on_kernels,
)
from safetensors.torch import load_file, save_file
from torch import nn

import randlora_ext

pytestmark = pytest.mark.usefixtures("one_thread", "stock_peft")
VERSION = randlora_ext.build_info()["spec_version"]


def generated(r=5, **options):
    return deep_config(r, accelerated.RandLoraConfig, basis="independent", **options)


def made(**options):
    accelerated.enable()
    return randomize(peft.get_peft_model(Deep(), generated(**options)))


@pytest.mark.parametrize(
    "options,density",
    [({}, 1 / 3), ({"density": 0.07}, 0.07), ({"very_sparse": True}, 1 / math.sqrt(40))],
    ids=str,
)
def test_bases_are_those_of_the_specification(options, density):
    model = made(projection_prng_key=7, **options)
    assert runs_on_kernels(model)
    for layer in layers(model):
        sizes = layer.in_features, layer.out_features
        assert basis_of(layer) == randlora_ext.TernaryBasis(*sizes, 5, density, seed=7)
        A, B = basis_of(layer).dense()  # what PEFT's code would see
        assert torch.equal(layer.randlora_A["default"][:, 0, :24], A)
        assert torch.equal(layer.randlora_B["default"][:40, :5].flatten(1), B)


def test_output_and_gradients_are_those_of_the_dense_formula():
    accelerated.enable()

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.lin, self.big = nn.Linear(24, 40), nn.Linear(72, 80)

        def forward(self, x):
            return self.lin(x)

    chosen = config(7, accelerated.RandLoraConfig, ["lin", "big"], basis="independent", density=0.2)
    model = randomize(peft.get_peft_model(Two().double(), chosen))
    x, dy = inputs(24, 40, torch.float64)
    ours = run(model, x, dy)
    for layer in layers(model):
        layer.__class__ = StockLinear
    assert_close(ours, run(model, x, dy), 1e-6)  # its dense bases round 1 / sqrt(density) to fp32


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_nothing_of_the_basis_is_saved(tmp_path, low_cpu_mem_usage):
    model = made(density=0.3, projection_prng_key=2**64 - 1, save_projection=True)
    x = torch.randn(6, 24)
    model.save_pretrained(tmp_path)
    keys = list(load_file(tmp_path / "adapter_model.safetensors"))
    assert keys and all(key.endswith(("randlora_lambda", "randlora_gamma")) for key in keys)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["projection_prng_key"] == f"generated-{VERSION}:{2**64 - 1}"
    loaded = peft.PeftModel.from_pretrained(Deep(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(loaded(x), model(x))
    assert loaded.peft_config["default"].projection_prng_key == 2**64 - 1


def test_stock_refuses_a_generated_adapter(tmp_path):
    made().save_pretrained(tmp_path)
    accelerated.disable()
    base = Deep()
    before = base(torch.ones(24))
    with (
        pytest.warns(UserWarning, match="basis"),
        pytest.raises((TypeError, RuntimeError), match="manual_seed|str"),
    ):
        peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(base(torch.ones(24)), before)


def test_a_configuration_read_before_enable_is_refused(tmp_path):
    made().save_pretrained(tmp_path)
    accelerated.disable()
    with pytest.warns(UserWarning, match="basis"):
        read = peft.PeftConfig.from_pretrained(tmp_path)
    accelerated.enable()
    with pytest.raises(ValueError, match=r"key is 'generated-1:0', .* after .*enable\(\)"):
        peft.PeftModel.from_pretrained(Deep(), tmp_path, config=read)


@pytest.mark.parametrize("text", [f"generated-{VERSION + 1}:0", "generated-x:0", "0", "peft-1:0"])
def test_another_version_of_the_specification_is_refused(tmp_path, text):
    made().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"projection_prng_key": text}))
    with pytest.raises(ValueError, match=rf"'{text}'; this version .* 'generated-{VERSION}:KEY'"):
        peft.PeftModel.from_pretrained(Deep(), tmp_path)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"basis": "other"}, r"basis must be one of \('peft', 'independent'\), got 'other'"),
        ({"basis": "independent", "projection_prng_key": -1}, r"in \[0, 2\*\*64\), got -1"),
        ({"basis": "independent", "projection_prng_key": 2**64}, "projection_prng_key"),
        ({"basis": "independent", "projection_prng_key": True}, "projection_prng_key .*True"),
        ({"basis": "independent", "density": 2.0}, "density"),
        ({"basis": "independent", "density": 0.1, "very_sparse": True}, "contradicts"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    accelerated.enable()
    with pytest.raises(ValueError, match=message):
        deep_config(5, accelerated.RandLoraConfig, **options)


def test_generated_before_enable():
    with pytest.raises(RuntimeError, match=r"basis='independent' needs .*enable\(\)"):
        generated()


def test_generated_beside_drawn_bases():
    accelerated.enable()
    model = peft.get_peft_model(Deep(), deep_config(5, sparse=True, save_projection=False))
    model.add_adapter("two", generated())
    randomize(model)
    x = torch.randn(6, 24)
    outputs = []
    for name in ("default", "two"):
        model.set_adapter(name)
        outputs.append(model(x))
    alone = randomize(peft.get_peft_model(Deep(), generated()))
    for layer, other in zip(layers(alone), layers(model), strict=True):
        for diagonals in ("randlora_lambda", "randlora_gamma"):
            getattr(layer, diagonals)["default"].data = getattr(other, diagonals)["two"].data
    assert torch.equal(alone(x), outputs[1]) and relative(*outputs) > 0.1


def shrink(state):
    name = next(key for key in state if key.endswith("randlora_gamma"))
    state[name] = state[name][:, :-1].contiguous()


def shrink_basis(state):
    state["base_model.randlora_B"] = state["base_model.randlora_B"][:-1].contiguous()


def integers(state):
    name = next(key for key in state if key.endswith("randlora_lambda"))
    state[name] = state[name].long()


@pytest.mark.parametrize(
    "spoil,message",
    [
        (shrink, r"size mismatch for base_model\.model\.a\.randlora_gamma\.(default|two)"),
        (shrink_basis, r"size mismatch for base_model\.randlora_B\."),
        (integers, r"dtype mismatch for base_model\.model\.a\.randlora_lambda\..*torch\.int64"),
    ],
)
def test_a_file_that_does_not_fit_raises_and_changes_nothing(tmp_path, spoil, message):
    accelerated.enable()
    model = randomize(peft.get_peft_model(Deep(), deep_config(5, sparse=True)))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    spoil(state)
    save_file(state, file, metadata={"format": "pt"})
    randomize(model, seed=8)
    x = torch.randn(6, 24)
    before, state = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    for name in ("two", "default"):  # a new adapter, and over one that is there
        with pytest.raises(RuntimeError, match=message):
            model.load_adapter(tmp_path, name)
        assert torch.equal(model(x), before)
        for key, value in state.items():
            assert torch.equal(model.state_dict()[key], value)
    model.delete_adapter("two")  # PEFT has added it, empty
    base = Deep()
    with pytest.raises(RuntimeError, match=message):
        peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(base(x), Deep()(x))


def test_what_a_file_lacks_is_named_as_by_stock(tmp_path):
    accelerated.enable()
    chosen = deep_config(5, sparse=True, save_projection=False)
    peft.get_peft_model(Deep(), chosen).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    state["base_model.model.z.randlora_gamma"] = state.pop("base_model.model.a.randlora_gamma")
    save_file(state, file, metadata={"format": "pt"})
    results = []
    for enabled in (False, True):
        accelerated.enable() if enabled else accelerated.disable()
        with pytest.warns(UserWarning, match=r"missing adapter keys .*model\.a\.randlora_gamma"):
            model = peft.PeftModel.from_pretrained(Deep(), tmp_path)
        result = model.load_adapter(tmp_path, "default")
        results.append((result.missing_keys, result.unexpected_keys))
    assert results[1] == results[0]
    missing, (unexpected,) = results[1]
    assert missing == ["base_model.model.a.randlora_gamma.default"]
    # PEFT before 0.21 names the adapter here too
    assert unexpected.removesuffix(".default") == "base_model.model.z.randlora_gamma"


def cut(data):
    return data[: len(data) // 2]


def no_header(data):
    return struct.pack("<Q", 2**40) + data[8:]


@pytest.mark.parametrize(
    "spoil", [cut, no_header, lambda data: b""], ids=["cut", "header", "empty"]
)
def test_a_corrupt_file_raises_and_changes_nothing(tmp_path, spoil):
    model = made()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(spoil(file.read_bytes()))
    x = torch.randn(6, 24)
    before = model(x)
    for name in ("two", "default"):
        with pytest.raises(Exception, match="(?i)header|safetensor|metadata"):
            model.load_adapter(tmp_path, name)
        assert torch.equal(model(x), before)


def test_a_config_of_another_r_is_refused(tmp_path):
    made().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 6}))
    with pytest.raises(RuntimeError, match="does not fit the model.*\n.*size mismatch"):
        peft.PeftModel.from_pretrained(Deep(), tmp_path)
