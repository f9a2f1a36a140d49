"""`state_dict` and `load_state_dict` of RandLoraLinear: what is in it, comes back, is refused."""

import copy
import io
import json
import warnings

import pytest
import torch
from layer_helpers import adapt, make_base, randomize
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from randlora_ext import RandLoraLinear

RECORD = "randlora_record.default._extra_state"
KINDS = {"hadamard": {}, "independent": {"density": 0.3}}


def layer_of(seed=2**63 + 5, r=5, randlora_alpha=9, layer_type="linear", sizes=(16, 24), **options):
    base = make_base(*sizes, layer_type)
    return randomize(RandLoraLinear(base, r, randlora_alpha, seed=seed, **options))


@pytest.fixture(params=KINDS)
def options(request):
    return KINDS[request.param]


@pytest.fixture
def layer(options):
    return layer_of(**options)


@pytest.fixture
def x():
    return torch.randn(7, 16, generator=torch.Generator().manual_seed(3))


# ---- what is in it -------------------------------------------------------------------------------


def test_the_keys(layer, options):
    keys = {"base_layer.weight", "base_layer.bias", RECORD}
    keys |= {"randlora_lambda.default", "randlora_gamma.default"}
    if not options:
        keys.add("randlora_input_scale.default")
    assert layer.state_dict().keys() == keys


def test_the_record(layer, options):
    named = "independent-1:density=0.3" if options else "hadamard-1"
    assert json.loads(bytes(layer.state_dict()[RECORD].tolist())) == {
        "projection_prng_key": f"randlora_ext:{named}:seed={2**63 + 5}",
        "r": 5,
        "randlora_alpha": 9,
        "in_features": 16,
        "out_features": 24,
    }


# ---- what comes back -----------------------------------------------------------------------------


def through_torch(state):
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


def through_safetensors(state, folder):
    save_file(state, folder / "state.safetensors")
    return load_file(folder / "state.safetensors")


WAYS = {
    "memory": lambda state, folder: state,
    "torch": lambda state, folder: through_torch(state),
    "safetensors": through_safetensors,
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("layer_type", ["linear", "conv1d"])
@pytest.mark.parametrize("way", WAYS)
def test_outputs_come_back_bit_for_bit(way, layer_type, assign, options, x, tmp_path):
    layer, other = (layer_of(layer_type=layer_type, **options) for _ in range(2))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(torch.nan)
    state = WAYS[way](layer.state_dict(), tmp_path)
    assert str(other.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("wrap", [torch.compile, checkpoint_wrapper])
def test_a_layer_that_is_wrapped(layer, options, wrap, x):
    other = RandLoraLinear(make_base(16, 24), 5, 9, seed=2**63 + 5, **options)
    wrap(other).load_state_dict(wrap(layer).state_dict())
    assert torch.equal(other(x), layer(x))


def test_the_adapter_alone(layer, options, x):
    """As users who keep the base model elsewhere save it."""
    alone = {key: value for key, value in layer.state_dict().items() if "randlora_" in key}
    other = RandLoraLinear(make_base(16, 24), 5, 9, seed=2**63 + 5, **options)
    missing, unexpected = other.load_state_dict(alone, strict=False)
    assert missing == ["base_layer.weight", "base_layer.bias"] and not unexpected
    assert torch.equal(other(x), layer(x))


def test_a_state_dict_that_was_cast(layer, options):
    """A record of floating point numbers is the same record."""
    state = {key: value.bfloat16() for key, value in layer.state_dict().items()}
    other = RandLoraLinear(make_base(16, 24), 5, 9, seed=2**63 + 5, **options)
    other.load_state_dict(state)
    lam = other.randlora_lambda["default"]
    assert torch.equal(lam, layer.randlora_lambda["default"])  # exact in bfloat16


# ---- what is refused, before anything is copied into the layer -----------------------------------


def assert_refused(layer, state, message, **how):
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state, **how)
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())


OTHERS = {
    "seed": ({"seed": 7}, r"projection_prng_key of the tensors is '.*seed=7', not '.*=92233720"),
    "r": ({"r": 3}, "r of the tensors is 3, not 5"),
    "alpha": ({"randlora_alpha": 9.5}, "randlora_alpha of the tensors is 9.5, not 9"),
    "size": ({"sizes": (16, 40)}, "out_features of the tensors is 40, not 24"),
    "larger side": ({"sizes": (16, 25)}, "out_features of the tensors is 25, not 24"),
    "turned": ({"sizes": (24, 16)}, "in_features of the tensors is 24, not 16"),
}
# A record alone tells apart what has tensors of the same shapes.
SAME_SHAPES = {"seed", "alpha"}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("case", OTHERS)
def test_tensors_of_another_adapter(case, strict, assign, layer, options):
    changes, message = OTHERS[case]
    state = layer_of(**options | changes).state_dict()
    shapes = [value.shape for key, value in state.items() if key != RECORD]
    own = [value.shape for key, value in layer.state_dict().items() if key != RECORD]
    assert (shapes == own) == (case in SAME_SHAPES)
    message = f"the tensors do not belong to the adapter[^$]*{message}"
    assert_refused(layer, state, message, strict=strict, assign=assign)


def test_tensors_of_another_density():
    other = layer_of(density=0.25)
    message = "density=0.25:seed=.*, not .*density=0.3:seed="
    assert_refused(layer_of(density=0.3), other.state_dict(), message)


def test_tensors_on_bases_of_another_kind():
    one, other = layer_of(), layer_of(density=0.3)
    assert_refused(one, other.state_dict(), "independent-1.*, not .*hadamard-1", strict=False)
    assert_refused(other, one.state_dict(), "hadamard-1.*, not .*independent-1", strict=False)


BAD = {
    "a text": (lambda tensor: "text", "must be a tensor, got str"),
    "integers": (lambda tensor: tensor.int(), "is torch.int32, and must be floating point"),
    "another shape": (lambda tensor: tensor[..., :1], r"is \(.*\b1,?\), and must be \("),
}


@pytest.mark.parametrize("part", ["lambda", "gamma", "input_scale"])
@pytest.mark.parametrize("case", BAD)
def test_tensors_that_do_not_fit(case, part):
    change, message = BAD[case]
    layer, key = layer_of(), f"randlora_{part}.default"
    state = {name: value + 1 for name, value in layer.state_dict().items() if name != RECORD}
    state[key] = change(state[key])
    assert_refused(layer, state, f"{key} {message}", strict=False)


@pytest.mark.parametrize("key", ["base_layer.weight", "randlora_lambda.default", RECORD])
@pytest.mark.parametrize("strict", [True, False])
def test_a_merged_layer_loads_nothing_but_its_record(layer, key, strict):
    """The new lambda and gamma could not undo the merge, which a new weight would not have."""
    state = layer.state_dict()
    layer.merge()
    if key == RECORD:
        assert not layer.load_state_dict({key: state[key]}, strict=False).unexpected_keys
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "base_layer.weight of this state dict holds")
        assert_refused(
            layer, {key: state[key]}, r"merged \['default'\].*unmerge\(\)", strict=strict
        )
    layer.unmerge()
    layer.load_state_dict(state)


@pytest.mark.parametrize("strict", [True, False])
def test_a_missing_record_is_refused(layer, strict):
    state = {key: value + 1 for key, value in layer.state_dict().items() if key != RECORD}
    assert_refused(layer, state, f"{RECORD} is missing, which says what the", strict=strict)


def test_the_layer_of_a_model_is_named():
    model = adapt(nn.ModuleDict({"q": make_base(16, 24)}), "q", r=5, seed=1)
    other = adapt(nn.ModuleDict({"q": make_base(16, 24)}), "q", r=5, seed=2)
    message = "state dict of q does not fit:\n\tthe tensors do not belong"
    assert_refused(model, other.state_dict(), message)


# ---- a merged layer ------------------------------------------------------------------------------


def test_the_state_dict_of_a_merged_layer_warns(layer):
    layer.merge()
    with pytest.warns(UserWarning, match=r"^base_layer\.weight .* holds the merged adapter"):
        state = layer.state_dict()
    assert torch.equal(state["base_layer.weight"], layer.weight)


def test_the_warning_names_the_layer_of_a_model():
    model = randomize(adapt(nn.ModuleDict({"q": make_base(16, 24)}), "q", r=5))
    model["q"].merge()
    with pytest.warns(UserWarning, match=r"^q\.base_layer\.weight "):
        model.state_dict()
