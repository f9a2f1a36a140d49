"""randlora_ext.peft: what stands where PEFT keeps A and B, packed and dense, and its memory."""

import copy
import gc
import pickle

import pytest
import torch
from peft_helpers import (
    Deep,
    accelerated,
    adapted,
    assert_close,
    config,
    deltas,
    inputs,
    layers,
    made,
    numbers,
    opened,
    pair,
    relative,
    run,
)
from torch import nn

import randlora_ext

SPARSE = {"sparse": True}


# ---- what stands for a basis ---------------------------------------------------------------------


@pytest.fixture
def model():
    return made(**SPARSE)


@pytest.fixture
def A(model):
    return model.base_model.randlora_A["default"]


def test_it_has_shape_dtype_and_device_of_the_dense_basis(A):
    dense = A.dense()
    assert (A.shape, A.dtype, A.device) == (dense.shape, dense.dtype, dense.device)


def test_it_can_be_pickled(A):
    assert torch.equal(pickle.loads(pickle.dumps(A)).dense(), A.dense())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_it_moves_and_casts(A, dtype):
    dense, moved = A.dense(), A.to("meta", dtype=dtype)
    assert (moved.device.type, moved.dtype) == ("meta", dtype)
    assert torch.equal(moved.to("cpu").dense(), dense.to(dtype)) and A.dtype == dense.dtype


def test_copies_share_it(model, A):
    assert copy.deepcopy(model).base_model.randlora_A["default"] is A
    assert A.to("cpu", A.dtype) is A


def test_adapters_of_equal_bases_share_it(model, A):
    model.add_adapter("two", config(5, **SPARSE))
    assert model.base_model.randlora_A["two"] is A


def test_share_memory_changes_nothing(model, x):
    before = model(x)
    assert torch.equal(model.share_memory()(x), before)


def test_bases_that_are_too_small_are_refused(model, x):
    bases = model.base_model
    bases.randlora_B["default"] = bases.randlora_B["default"].dense()[:, :2]
    with pytest.raises(ValueError, match=r"randlora_B \(40, 2, 5\) do not serve .*24 -> 40 .*r=5"):
        model(x)


def test_sparse_bases_without_a_non_zero_are_refused():
    with pytest.raises(ValueError, match="PEFT's sparse bases leave no non-zero in randlora_A"):
        adapted(nn.Sequential(nn.Linear(1, 1)), "0", 1, **SPARSE)


def test_independent_bases_without_a_non_zero_are_told():
    """Not refused, because only the layers' part may be empty."""
    model = made(basis="independent", density=1e-7)
    with pytest.warns(UserWarning, match="no non-zero element in B, so its adapter cannot learn"):
        model(torch.randn(2, 24))


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


WRITES = {
    "in place": lambda model, state: model.load_state_dict(state),
    "assigned": lambda model, state: model.load_state_dict(copy.deepcopy(state), assign=True),
}


@pytest.mark.parametrize("write", WRITES)
def test_changed_bases_are_noticed(x, write):
    stock, ours = pair(Deep(), lambda: config(5, **SPARSE))
    state = {name: value.flip(0) for name, value in numbers(stock).items()}
    assert any("randlora_A" in name for name in state)
    before = ours(x)
    for model in (stock, ours):
        WRITES[write](model, state)
    assert relative(ours(x), stock(x)) < 1e-5 < 0.01 < relative(ours(x), before)


# ---- devices without kernels ---------------------------------------------------------------------


@pytest.fixture
def no_kernels(monkeypatch):
    def turn_off():
        for module in ("peft.layer", "devices"):
            monkeypatch.setattr(f"randlora_ext.{module}.has_kernels", lambda device_type: False)

    return turn_off


def compiled(model):
    return torch.compile(model, backend="aot_eager")


CASES = [(SPARSE, lambda model: model), (SPARSE, compiled), ({}, lambda model: model)]


@pytest.mark.parametrize("options, wrap", CASES, ids=["sparse", "sparse compiled", "uniform"])
def test_plain_torch_computes_what_kernels_do(no_kernels, options, wrap):
    x, dy = inputs(24, 40)
    want = run(made(**options), x, dy)
    no_kernels()
    assert_close(run(wrap(made(**options)), x, dy), want, 1e-5)


@pytest.mark.parametrize("options", [SPARSE, {}], ids=str)
def test_plain_torch_gives_the_update_that_kernels_give(no_kernels, options):
    want = deltas(made(**options))
    no_kernels()
    assert_close(deltas(made(**options)), want, 1e-6)


@pytest.mark.parametrize("options, count", [(SPARSE, 1), ({}, 0)], ids=["sparse", "uniform"])
def test_one_warning_says_that_ternary_bases_are_multiplied_as_dense_ones(
    no_kernels, recwarn, options, count, x
):
    no_kernels()
    model = made(**options)
    model(x)
    model(x)
    told = [each for each in recwarn if "CUDA kernels of randlora_ext are" in str(each)]
    assert len(told) == count


@pytest.mark.parametrize("options", [SPARSE, {}], ids=str)
def test_a_summary_says_that_bases_are_dense(no_kernels, options, x):
    no_kernels()
    model = made(**options)
    model(x)
    assert {layer.basis_of("default", x.device).kind for layer in layers(model)} == {"dense"}
    assert "r=5 dense by torch's GEMMs" in accelerated.kernel_summary(model)


# ---- memory --------------------------------------------------------------------------------------

IN, OUT, R = 200, 256, 16
DENSE = OUT * 13 * R  # numbers of B: D * n * r, more than any weight has


def wide():
    return nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, IN))


@pytest.fixture
def dense_tensors():
    """Returns the shapes of ordinary tensors as large as a dense B that the test has made."""

    def living():
        gc.collect()
        tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
        return [t for t in tensors if t.numel() >= DENSE and t.is_floating_point()]

    before = {id(tensor) for tensor in living()}  # which helpers of other tests keep
    return lambda: [tensor.shape for tensor in living() if id(tensor) not in before]


def step(model):
    model(torch.randn(3, IN)).square().sum().backward()


PACKED = pytest.mark.parametrize("options", [SPARSE, {"density": 0.2}, {"basis": "hadamard"}])


@PACKED
def test_a_new_model_holds_no_dense_basis(options, dense_tensors):
    model = adapted(wide(), "02", R, **options)
    assert not dense_tensors() and all(buffer.dim() == 1 for buffer in model.buffers())


def save(model, folder):
    model.save_pretrained(folder)


def cast(model, folder):
    model.double().float()


def add_adapter(model, folder):
    model.add_adapter("two", copy.deepcopy(model.peft_config["default"]))


@PACKED
@pytest.mark.parametrize("use", [save, cast, add_adapter])
def test_no_use_leaves_a_dense_basis(tmp_path, options, use, dense_tensors):
    model = adapted(wide(), "02", R, **options)
    step(model)
    use(model, tmp_path)
    assert not dense_tensors()


@PACKED
def test_a_loaded_model_trains_without_a_dense_basis(tmp_path, options, dense_tensors):
    adapted(wide(), "02", R, **options).save_pretrained(tmp_path)
    model = opened(tmp_path, wide, is_trainable=True)
    step(model)
    assert not dense_tensors()


@pytest.mark.parametrize("options", [{"sparse": True}, {}], ids=["packed", "uniform"])
def test_bases_go_with_their_model(options):
    def living() -> int:
        gc.collect()
        return sum(isinstance(thing, randlora_ext.Basis) for thing in gc.get_objects())

    before, model = living(), made(**options)  # a test that failed keeps what it held
    for _ in range(20):  # moves keep nothing
        model.double()(torch.randn(2, 24, dtype=torch.float64))
        model.float()(torch.randn(2, 24))
    assert 0 < living() - before <= (8 if options else 6)
    del model
    assert living() == before
