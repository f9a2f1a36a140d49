"""randlora_ext.peft: bases that are only a seed, the text that describes them, packed and dense."""

import copy
import dataclasses
import gc
import json
import pickle
import re

import pytest
import torch
from peft.utils.save_and_load import load_peft_weights
from peft_helpers import (
    Deep,
    accelerated,
    adapted,
    assert_close,
    config,
    deltas,
    edit,
    inputs,
    layers,
    made,
    numbers,
    opened,
    pair,
    peft,
    relative,
    run,
)
from safetensors.torch import load_file
from torch import nn

import randlora_ext
from randlora_ext.nn.adapter_record import RECORD_KEY

KEY = "randlora_ext:independent-1:density={}:seed={}"


DESCRIBED = {
    "independent": {"basis": "independent", "density": 0.07, "projection_prng_key": 2**64 - 1},
    "hadamard": {"basis": "hadamard", "save_projection": True},  # which is overruled
}


@pytest.mark.parametrize("autocast", [True, False])
def test_low_cpu_mem_usage_on_a_16_bit_base_rounds_nothing(tmp_path, autocast):
    """Unless it is told to keep the dtype of the base."""
    made(basis="hadamard").save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    models = [
        opened(
            tmp_path,
            lambda: Deep().bfloat16(),
            low_cpu_mem_usage=low,
            autocast_adapter_dtype=autocast,
        )
        for low in (True, False)
    ]
    for model in models:
        for name, layer in model.base_model.model.named_children():
            for kind in ("randlora_lambda", "randlora_gamma"):
                want = saved[f"base_model.model.{name}.{kind}"]
                got = getattr(layer, kind)["default"]
                assert got.dtype == (torch.float32 if autocast else torch.bfloat16)
                assert torch.equal(got, want.to(got.dtype))


@pytest.mark.parametrize("options", DESCRIBED.values(), ids=DESCRIBED)
def test_the_text_alone_decides_the_bases_at_every_door(tmp_path, options, x):
    """Stock PEFT's round trip would keep the key, drop `basis` and `density`, and tell nobody."""
    options = {"projection_prng_key": 3} | options
    model = made(**options)
    model.save_pretrained(tmp_path)
    keys = list(load_file(tmp_path / "adapter_model.safetensors"))
    own = "randlora_lambda", "randlora_gamma", "randlora_input_scale", RECORD_KEY
    assert keys and all(key.endswith(own) for key in keys)
    loaded = opened(tmp_path, low_cpu_mem_usage=True)
    assert loaded.peft_config["default"].density == model.peft_config["default"].density
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(RuntimeError, match="no dense form here"):
        loaded.base_model.randlora_A["default"].dense()
    loaded.save_pretrained(tmp_path)
    accelerated.disable()
    with pytest.raises(KeyError):
        peft.PeftConfig.from_pretrained(tmp_path)
    edit(tmp_path / "adapter_config.json", peft_type="RANDLORA")
    with pytest.warns(UserWarning, match="'basis', 'density'"):
        read_by_stock = peft.PeftConfig.from_pretrained(tmp_path)
    read_by_stock.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not {"basis", "density"} & text.keys()
    accelerated.enable()
    key = text["projection_prng_key"]
    alone = config(5, accelerated.RandLoraConfig, projection_prng_key=key)
    doors = [
        opened(tmp_path),
        opened(tmp_path, config=read_by_stock),
        opened(tmp_path, config=alone),
        *(made(seed=4, **options | other) for other in ({}, {}, {"projection_prng_key": 8})),
        peft.inject_adapter_in_model(peft.PeftConfig.from_pretrained(tmp_path), Deep()),
    ]
    accelerated.hotswap_adapter(doors[3], tmp_path)
    doors[4].load_adapter(tmp_path, "default")
    doors[5].load_adapter(tmp_path, "two")
    doors[5].set_adapter("two")
    state = load_peft_weights(tmp_path, device="cpu")
    peft.set_peft_model_state_dict(doors[6], state)
    for door in doors:
        assert torch.equal(door(x), model(x))


def test_a_configuration_holds_the_text_and_each_thing_once():
    accelerated.enable()
    made_of = accelerated.RandLoraConfig
    for chosen, key, basis, density in (
        (made_of(basis="independent"), KEY.format(1 / 3, 0), "independent", 1 / 3),
        (made_of(density=0.2, projection_prng_key=9), KEY.format(0.2, 9), "independent", 0.2),
        (made_of(basis="hadamard"), "randlora_ext:hadamard-1:seed=0", "hadamard", None),
        (made_of(sparse=True), 0, "peft", None),
    ):  # fmt: skip
        again = made_of(**chosen.to_dict()), dataclasses.replace(chosen), copy.copy(chosen)
        for each in (chosen, *again, made_of(projection_prng_key=key, sparse=chosen.sparse)):
            assert (each.projection_prng_key, each.basis, each.density) == (key, basis, density)
    assert made_of().to_dict() == peft.RandLoraConfig().to_dict()


BAD_OPTIONS = [
    ({"alpha": 16}, "RandLoraConfig.* got an .* argument 'alpha'"),
    ({"basis": "indep"}, "basis must be one of .*got 'indep'; did you mean 'independent'"),
    ({"density": 0.1, "sparse": True}, "sparse is of PEFT's own bases; .* takes a density"),
    ({"basis": "independent", "projection_prng_key": -1}, r"projection_prng_key .*got -1"),
    ({"projection_prng_key": 2**64}, r"projection_prng_key must .* in \[-2\*\*63, 2\*\*64\)"),
    ({"projection_prng_key": "generated-1:0"}, "'generated-1:0' is no key of a basis"),
    ({"projection_prng_key": KEY.replace("-1", "-2").format(0.1, 0)}, "independent-2.* knows"),
    ({"projection_prng_key": KEY.format(0.1, 0), "basis": "independent", "density": 0.2},
     r"contradicts .*density=0\.2"),
    ({"projection_prng_key": KEY.format(0.1, 0), "sparse": True}, "contradicts .*'sparse'"),
    ({"projection_prng_key": KEY.format(0.1, 0), "basis": "hadamard"},
     "contradicts basis='hadamard'"),
    ({"randlora_alpha": 10**400}, "randlora_alpha must be a finite number, got an integer of 1329"),
]  # fmt: skip


def test_bad_options():
    accelerated.enable()
    for options, message in BAD_OPTIONS:
        with pytest.raises((TypeError, ValueError), match=message):
            config(5, accelerated.RandLoraConfig, **options)


@pytest.mark.filterwarnings("error")
def test_a_recipient_with_stock_peft_is_told_what_opens_the_file(tmp_path):
    """And nothing else before it; other programs find the task where they look for it."""
    model = made(basis="independent", density=0.1, task_type="FEATURE_EXTRACTION", randlora_alpha=9)
    model.save_pretrained(tmp_path)
    read = peft.PeftConfig.from_pretrained(tmp_path)
    assert read.task_type == "FEATURE_EXTRACTION" and read.peft_type == "RANDLORA"
    accelerated.disable()
    with pytest.raises(RuntimeError, match=r"needs randlora_ext\.peft\.enable\(\)"):
        config(cls=accelerated.RandLoraConfig, basis="hadamard")
    with pytest.raises(Exception, match="expected a long, but got str"):
        peft.get_peft_model(Deep(), model.peft_config["default"])  # draws no other bases
    how = "needs randlora_ext: import randlora_ext.peft; randlora_ext.peft.enable()"
    for read in (opened, peft.PeftConfig.from_pretrained):
        with pytest.raises(KeyError, match=f"^'RANDLORA; {re.escape(how)}'$"):
            read(tmp_path)


def test_bases_without_a_value_in_them():
    """A warning for what is generated, where the layers' part alone may be empty."""
    tiny = nn.Sequential(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="PEFT's sparse bases leave no non-zero in randlora_A"):
        adapted(tiny, "0", 1, sparse=True)
    with pytest.warns(UserWarning, match="no non-zero element in B, so its adapter cannot learn"):
        made(basis="independent", density=1e-7)(torch.randn(2, 24))


@pytest.mark.parametrize("options", [{"basis": "hadamard"}, {"sparse": True}, {}], ids=str)
def test_initialisation_on_the_meta_device(recwarn, options, x):
    """As FSDP2 is fed: no weight exists before `to_empty`; what a seed decides survives it."""
    full = made(**options)
    state = {n: v for n, v in full.state_dict().items() if "base_model.randlora_" not in n}
    with torch.device("meta"):
        model = made(**options)
        assert model(torch.empty(6, 24)).shape == (6, 40)
    model.to_empty(device="cpu")
    model.load_state_dict(state, strict=False)
    assert torch.equal(model(x), full(x))
    assert not options or not [w for w in recwarn if "dense bases" in str(w.message)]


def test_changed_bases_are_noticed(x):
    models = pair(Deep(), lambda: config(5, sparse=True))
    state = numbers(models[0])
    assert any("randlora_A" in name for name in state)
    flipped = {name: value.flip(0) for name, value in state.items()}
    for change in (
        lambda model: model.load_state_dict(flipped),  # written to
        lambda model: model.load_state_dict(copy.deepcopy(state), assign=True),
    ):
        before = models[1](x)
        for model in models:
            change(model)
        stock, ours = (model(x) for model in models)
        assert relative(ours, stock) < 1e-5 < 0.01 < relative(ours, before)


def test_what_stands_for_a_basis(x):
    model = made(sparse=True)
    bases = model.base_model
    A = bases.randlora_A["default"]
    dense = A.dense()
    assert (A.shape, A.dtype, A.device) == (dense.shape, dense.dtype, dense.device)
    assert torch.equal(pickle.loads(pickle.dumps(A)).dense(), dense)
    for dtype in (torch.bfloat16, torch.float64):
        moved = A.to("meta", dtype=dtype)
        assert (moved.device.type, moved.dtype) == ("meta", dtype)
        assert torch.equal(moved.to("cpu").dense(), dense.to(dtype)) and A.dtype == dense.dtype
    assert copy.deepcopy(model).base_model.randlora_A["default"] is A.to("cpu", A.dtype) is A
    model.add_adapter("two", config(5, sparse=True))
    assert bases.randlora_A["two"] is A
    model.delete_adapter("two")
    before = model(x)
    assert torch.equal(model.share_memory()(x), before)
    bases.randlora_B["default"] = bases.randlora_B["default"].dense()[:, :2]
    with pytest.raises(ValueError, match=r"randlora_B \(40, 2, 5\) do not serve .*24 -> 40 .*r=5"):
        model(x)


@pytest.mark.parametrize("kind,compiled", [({"sparse": True}, True), ({}, False)], ids=str)
def test_a_device_without_kernels(monkeypatch, recwarn, kind, compiled):
    """Ternary bases are multiplied as dense ones, and one warning says so."""
    x, dy = inputs(24, 40)
    served = made(**kind)
    want, deltas_of_kernels = run(served, x, dy), deltas(served)
    for module in ("peft.layer", "devices"):
        monkeypatch.setattr(f"randlora_ext.{module}.serve", lambda device_type: False)
    model = made(**kind)
    for call in (model, torch.compile(model, backend="aot_eager") if compiled else model):
        assert_close(run(call, x, dy), want, 1e-5)
    assert_close(deltas(model), deltas_of_kernels, 1e-6)
    told = [each for each in recwarn if "CUDA kernels of randlora_ext are" in str(each)]
    assert len(told) == (1 if kind else 0)
    assert {layer.basis_of("default", x.device).kind for layer in layers(model)} == {"dense"}
    assert "r=5 dense by torch's GEMMs" in accelerated.kernel_summary(model)


IN, OUT, R = 200, 256, 16
DENSE = OUT * 13 * R  # numbers of B: D * n * r, which no weight has


def wide():
    return nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, IN))


def dense_tensors():
    """Ordinary tensors that are as large as a dense B."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
    return [t.shape for t in tensors if t.numel() >= DENSE and t.is_floating_point()]


def step(model):
    model(torch.randn(3, IN)).square().sum().backward()


@pytest.mark.parametrize("kind", [{"sparse": True}, {"density": 0.2}, {"basis": "hadamard"}])
def test_no_dense_basis_is_alive(tmp_path, kind):
    model = adapted(wide(), "02", R, **kind)
    assert not dense_tensors() and all(buffer.dim() == 1 for buffer in model.buffers())
    step(model)
    model.save_pretrained(tmp_path)
    model.double().float()
    model.add_adapter("two", config(R, accelerated.RandLoraConfig, "02", **kind))
    assert not dense_tensors()
    step(opened(tmp_path, wide, is_trainable=True))
    assert not dense_tensors()
    if "sparse" in kind:
        accelerated.disable()
        model = peft.get_peft_model(wide(), config(R, targets="02", **kind))
        assert dense_tensors()
        step(accelerated.accelerate(model))
        assert not dense_tensors()


@pytest.mark.parametrize("options", [{"sparse": True}, {}], ids=["packed", "uniform"])
def test_bases_go_with_their_model(options):
    def living() -> int:
        gc.collect()
        return sum(isinstance(thing, randlora_ext.Basis) for thing in gc.get_objects())

    model = made(**options)
    for _ in range(20):  # moves keep nothing
        model.double()(torch.randn(2, 24, dtype=torch.float64))
        model.float()(torch.randn(2, 24))
    assert 0 < living() <= (8 if options else 6)
    del model
    assert living() == 0
