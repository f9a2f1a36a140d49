"""`calibrate`, and the vector that it gives: what it is, what it changes, and where it goes."""

import copy
import statistics

import pytest
import torch
from layer_helpers import (
    assert_right,
    input_scale_of,
    inputs,
    normalized,
    pickled,
    randomize,
    relative,
    uneven,
)
from torch import nn

import randlora_ext
from randlora_ext import RandLoraLinear, calibrate


def layer_of(in_features=24, out_features=40, **options):
    torch.manual_seed(0)
    return RandLoraLinear(nn.Linear(in_features, out_features), r=5, **options)


class Net(nn.Module):
    """Two layers, one of which is called twice, and dropout, which must not act."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(24, 40), nn.Linear(40, 24)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, attention_mask=None):
        return self.two(torch.tanh(self.one(self.two(self.drop(self.one(x))))))


def net(**options):
    return randlora_ext.apply_randlora(Net(), ["one", "two"], r=5, basis="hadamard", **options)


SIZES = [(24, 40), (40, 24), (33, 33), (6, 90)]
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


@pytest.mark.parametrize("sizes, dtype", zip(SIZES, LIMITS, strict=True), ids=str)
def test_a_layer_with_a_scale_is_one_whose_update_has_scaled_columns(sizes, dtype):
    layer = randomize(RandLoraLinear(nn.Linear(*sizes).to(dtype), r=5, basis="hadamard"))
    x, dy = inputs(layer, 2, 7, dtype=dtype)
    before = layer.get_delta_weight("default")
    scale = torch.rand(sizes[0]) + 0.1
    layer.set_input_scale("default", scale)
    assert "hadamard (calibrated) by" in repr(layer)
    after = layer.get_delta_weight("default")
    assert relative(after, before.double() * scale.double()) < max(LIMITS[dtype], 1e-6)
    assert_right(layer, x, dy, LIMITS[dtype])
    layer.set_input_scale("default", None)
    assert "hadamard (not calibrated) by" in repr(layer)
    assert torch.equal(layer.get_delta_weight("default"), before)


@pytest.mark.parametrize("batch", ["tensor", "tuple", "mapping"])
def test_the_vector_is_that_of_the_formula(batch):
    model, batches = net(), [uneven(3, 7), uneven(5, 7, seed=1)]
    of = {"tensor": lambda x: x, "tuple": lambda x: (x,), "mapping": lambda x: {"x": x}}[batch]
    seen = {"one": [], "two": []}
    hooks = [
        getattr(model, name).register_forward_pre_hook(lambda _, x, at=seen[name]: at.append(x[0]))
        for name in seen
    ]
    model.train()
    model.one.eval()
    modes = [module.training for module in model.modules()]
    calibrate(model, map(of, batches))
    for hook in hooks:
        hook.remove()
    assert [module.training for module in model.modules()] == modes
    assert len(seen["one"]) == 4  # twice a batch
    for name, at in seen.items():
        scale = getattr(model, name).randlora_input_scale["default"]
        assert scale.dtype == torch.float32
        assert relative(normalized(scale), input_scale_of(*at)) < 1e-6
    first = model.one.randlora_input_scale["default"].clone()
    calibrate(model, [batches[0]])  # replaces
    assert not torch.equal(first, model.one.randlora_input_scale["default"])


def test_features_that_vary_little_count_little_and_none_is_lost():
    x = uneven(50)
    x[:, 5] = x[:, 5] / 100 + 3
    x[:, 6] = 7
    layer = layer_of(basis="hadamard")
    calibrate(layer, [x])
    scale = layer.randlora_input_scale["default"]
    assert relative(normalized(scale), input_scale_of(x)) < 1e-6
    median = scale.median()
    assert scale[5] == scale[6] == scale.min() and scale[6] == pytest.approx(median / 1000)


def test_tokens_that_are_all_alike():
    """Which features vary cannot be known, so their size alone counts."""
    x = uneven()
    for batch in (x, x[None], x.expand(2, 3, 24)):  # also without a dimension of tokens
        layer = layer_of(basis="hadamard")
        calibrate(layer, [batch])
        want = 1 / (x.abs() + 0.1 * x.abs().median())
        scale = layer.randlora_input_scale["default"]
        assert relative(normalized(scale), normalized(want)) < 1e-6


def test_padding_is_left_out(monkeypatch):
    monkeypatch.setattr(Net, "forward", lambda self, x, attention_mask: self.one(x))
    model = randlora_ext.apply_randlora(Net(), ["one"], r=5, basis="hadamard")
    x, mask = uneven(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[0, :4] = 0
    calibrate(model, [{"x": x, "attention_mask": mask}])
    scale, kept = model.one.randlora_input_scale["default"], x[mask != 0]
    assert relative(normalized(scale), input_scale_of(kept)) < 1e-6
    assert response(scale, kept, model.one(kept)) == pytest.approx(1.5, rel=1e-5)


def response(scale, x, y):
    """Of a layer to a random update: what it would change over the layer's own outputs."""
    return float(((x * scale).square().sum() / y.detach().square().mean(1).sum()).sqrt())


@pytest.mark.parametrize("names", [["one", "two"], ["two"], ["one", "two", "three"]])
def test_the_median_layer_of_every_model_responds_equally(names):
    torch.manual_seed(0)
    layers = {"one": nn.Linear(24, 40), "two": nn.Linear(40, 24), "three": nn.Linear(24, 90)}
    with torch.no_grad():
        layers["two"].weight *= 30  # a layer that responds little goes on doing so
    model = nn.Sequential(*(layers[name] for name in ("one", "two", "three")))
    places = [str(["one", "two", "three"].index(name)) for name in names]
    randlora_ext.apply_randlora(model, places, r=5, basis="hadamard")
    seen = {}
    for at in places:
        model[int(at)].register_forward_hook(lambda _, x, y, at=at: seen.update({at: (x[0], y)}))
    calibrate(model, [uneven(50)])
    responses = [
        response(model[int(at)].randlora_input_scale["default"], *seen[at]) for at in places
    ]
    assert statistics.median(responses) == pytest.approx(1.5, rel=1e-5)
    assert len(names) == 1 or max(responses) > 2 * min(responses)


def test_a_layer_whose_outputs_are_zero_has_no_strength_of_its_own():
    model = net()
    with torch.no_grad():
        model.two.base_layer.weight.zero_()
        model.two.base_layer.bias.zero_()
    calibrate(model, [uneven(50)])
    assert model.two.is_calibrated("default") and model.one.is_calibrated("default")
    for layer in (model.one, model.two):
        assert layer.randlora_input_scale["default"].isfinite().all()


def test_only_active_hadamard_adapters():
    layer = layer_of(basis="hadamard")
    layer.update_layer("sparse", r=5, density=0.3)
    layer.update_layer("idle", r=5, basis="hadamard")
    layer.set_adapter(["default", "sparse"])
    calibrate(layer, [uneven(9)])
    assert [name for name in layer.bases if layer.is_calibrated(name)] == ["default"]


def refusals():
    sparse, merged = layer_of(density=0.3), layer_of(basis="hadamard")
    merged.merge()
    off = layer_of(basis="hadamard")
    off.disable()
    x = uneven(9)
    return {
        "no active adapter on Hadamard bases": [(sparse, [x]), (off, [x]), (nn.Linear(24, 2), [x])],
        "adapter 'default' of layer '' is merged": [(merged, [x])],
        "has trained .its lambda is not zero": [(randomize(layer_of(basis="hadamard")), [x])],
        "at least one batch, got none": [(layer_of(basis="hadamard"), [])],
        "the inputs or outputs of layer 'one' hold NaN or infinity": [(net(), [x, x.log()])],
        "batches must be several, such as .batch., got one tensor or mapping": [
            (net(), x),
            (net(), {"x": x}),
        ],
        "batches must be several, such as .batch., got ('abc'|None|3)": [
            (net(), wrong) for wrong in ("abc", None, 3)
        ],
        "batches must hold what the model takes.*, got ('hello'|None)": [
            (net(), wrong) for wrong in (["hello"], [x, "hello"], [None])
        ],
        "model must be an nn.Module, got None": [(None, [x])],
    }


@pytest.mark.parametrize("message, cases", refusals().items())
def test_what_is_refused_and_changes_nothing(message, cases):
    for model, batches in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            calibrate(model, batches)
        modules = [] if model is None else model.modules()
        layers = [m for m in modules if isinstance(m, RandLoraLinear)]
        assert not any(layer.is_calibrated("default") for layer in layers)
        assert not any(layer._forward_pre_hooks for layer in layers)


def test_layers_without_tokens_or_with_zeros_alone_stay_as_they_are():
    model = nn.Sequential(layer_of(basis="hadamard"))
    for batch in (torch.zeros(3, 24), torch.zeros(0, 24)):
        with pytest.warns(UserWarning, match=r"to 1 of 1 layers, .* stay as they were: \['0'\]"):
            calibrate(model, [batch])
        assert not model[0].is_calibrated("default")
    masked, x = net(), uneven(2, 7)
    with pytest.warns(UserWarning, match="batches brought no token") as told:
        calibrate(masked, [{"x": x, "attention_mask": torch.zeros(2, 7)}])
    assert len(told) == 1 and "to 2 of 2 layers" in str(told[0].message)
    assert not masked.one.is_calibrated("default")
    most = torch.tensor([0.0, 0, 0, 2, 4]).repeat(5)[:24]
    calibrate(model, [most[None]])
    scale = model[0].randlora_input_scale["default"]
    assert scale.isfinite().all() and float(scale.max() / scale.min()) < 30


@pytest.mark.parametrize(
    "bad, message",
    [
        (torch.ones(40), r"must be \(in_features,\) = \(24,\), got \(40,\)"),
        (torch.zeros(24), "positive and finite"),
        (torch.full((24,), torch.nan), "positive and finite"),
        ([1.0] * 24, "must be a floating tensor or None"),
        (torch.ones(24, dtype=torch.long), "must be a floating tensor or None"),
    ],
    ids=str,
)
def test_vectors_that_do_not_fit(bad, message):
    layer = layer_of(basis="hadamard")
    with pytest.raises((TypeError, ValueError), match=message):
        layer.set_input_scale("default", bad)
    assert not layer.is_calibrated("default")
    with pytest.raises(ValueError, match="goes with Hadamard bases, got kind='independent'"):
        layer_of(density=0.3).set_input_scale("default", torch.ones(24))
    layer.merge()
    with pytest.raises(RuntimeError, match="is merged; unmerge it first"):
        layer.set_input_scale("default", torch.ones(24))
    with pytest.raises(RuntimeError, match=r"the layer has merged \['default'\] into its weight"):
        layer.load_state_dict({"randlora_input_scale.default": torch.ones(24)}, strict=False)


def calibrated():
    model = net()
    calibrate(model, [uneven(9)])
    return randomize(model)


def test_the_vector_goes_where_the_adapter_goes(tmp_path):
    """Copies, state dicts and files take it along, or take it away where they have none."""
    bare, scaled, x = randomize(net()).eval(), calibrated().eval(), uneven(9, seed=2)
    file = tmp_path / "adapter"
    for source, target in ((bare, scaled), (scaled, bare)):
        want = source(x)
        randlora_ext.save_adapter(source, file)
        others = [copy.deepcopy(source), pickled(source)[0], copy.deepcopy(target)]
        others[2].load_state_dict(source.state_dict())
        for other in (*others, randlora_ext.load_adapter(Net(), file)):
            assert torch.equal(other.eval()(x), want)
    kept, want = scaled.one.base_layer.weight.clone(), scaled(x)
    scaled.one.merge()
    scaled.two.merge()
    assert relative(scaled(x), want) < 1e-5
    scaled.one.unmerge()
    assert torch.equal(scaled.one.base_layer.weight, kept)
    vector = scaled.one.randlora_input_scale["default"]
    cast = copy.deepcopy(scaled).bfloat16().one.randlora_input_scale["default"]
    assert torch.equal(cast, vector)


def flipped(scale):
    """One bit is another: that of a sign."""
    return torch.cat([scale[:-1], -scale[-1:]])


BAD = {
    "shape": (lambda scale: scale[:24], r"is \(24,\), and must be \(40,\)"),
    "sign": (flipped, "must be positive and finite in every feature"),
    "nan": (lambda scale: scale.log() * torch.inf, "must be positive and finite in every feature"),
    "meta": (lambda scale: scale.to("meta"), r"has no numbers \(meta device\)"),
    "integers": (lambda scale: scale.ceil().int(), "is torch.int32, and must be floating point"),
    "missing": (None, "is missing: adapters on Hadamard bases have one"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("assign", [False, True])
def test_what_does_not_fit_the_last_layer_is_refused_before_the_first_is_loaded(case, assign):
    model, state = calibrated(), calibrated().state_dict()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, key = (
        {name: value + 1 for name, value in state.items()},
        "two.randlora_input_scale.default",
    )
    (change, message), scale = BAD[case], state.pop(key)
    if change is not None:
        state[key] = change(scale)
    for target in (model, nn.Sequential(model)):
        prefix = "" if target is model else "0."
        given = {prefix + name: value for name, value in state.items()}
        with pytest.raises(RuntimeError, match=f"{key} {message}"):
            target.load_state_dict(given, strict=change is not None, assign=assign)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_tied_layer_has_one_vector(tmp_path):
    def tied():
        layer = nn.Linear(24, 24)
        return randlora_ext.apply_randlora(nn.Sequential(layer, layer), ["0", "1"], r=5)

    model, one, two = tied(), *(f"{i}.randlora_input_scale.default" for i in range(2))
    assert model[0] is model[1]
    calibrate(model, [uneven(9)])
    state = randomize(model).state_dict()
    other = tied()
    other.load_state_dict(state)
    assert torch.equal(other(uneven(3)), model(uneven(3)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=f"{two} differs from {one}, and both are of one tied"):
        model.load_state_dict(state | {two: state[two] * 2})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_tied_layer_has_one_vector_in_a_file(tmp_path):
    def squares(tied):
        torch.manual_seed(0)
        layers = [nn.Linear(24, 24), nn.Linear(24, 24)]
        return nn.Sequential(layers[0], layers[0] if tied else layers[1])

    model = randlora_ext.apply_randlora(squares(False), ["0", "1"], r=5)
    scale = torch.rand(24) + 0.5
    for layer in model:
        layer.set_input_scale("default", scale)
    randlora_ext.save_adapter(model, tmp_path / "equal")
    opened = randlora_ext.load_adapter(squares(True), tmp_path / "equal")
    assert opened[0] is opened[1]
    assert torch.equal(opened[0].randlora_input_scale["default"], scale)
    model[1].set_input_scale("default", None)
    randlora_ext.save_adapter(model, tmp_path / "different")
    bare = squares(True)
    with pytest.raises(ValueError, match="1: it is tied to 0, whose tensors differ"):
        randlora_ext.load_adapter(bare, tmp_path / "different")
    assert type(bare[0]) is nn.Linear


def test_the_vector_is_a_float32_buffer():
    model = calibrated()
    scale = model.one.randlora_input_scale["default"].clone()
    buffers = dict(model.named_buffers())
    assert torch.equal(buffers.pop("one.randlora_input_scale.default"), scale)
    assert buffers.keys() == {"two.randlora_input_scale.default"}
    for cast in ("half", "bfloat16", "double", "cpu", "share_memory"):
        each = getattr(copy.deepcopy(model), cast)().one.randlora_input_scale["default"]
        assert each.dtype == torch.float32 and torch.equal(each, scale)
    given = {key: value.bfloat16() for key, value in model.state_dict().items()}
    for assign in (False, True):
        other = net()
        other.load_state_dict(given, assign=assign)
        each = other.one.randlora_input_scale["default"]
        assert each.dtype == torch.float32 and torch.equal(each, scale.bfloat16().float())
        assert other.two.base_layer.weight.dtype == (torch.bfloat16 if assign else torch.float32)


def test_on_the_meta_device():
    model, state = net().to("meta"), calibrated().state_dict()
    assert model.one.randlora_input_scale["default"].is_meta
    assert not model.one.is_calibrated("default") and "not calibrated" in repr(model.one)
    with pytest.raises(RuntimeError, match=r"adapter 'default' has no numbers \(meta device\)"):
        model.one.set_input_scale("default", torch.ones(24))
    empty = model.to_empty(device="cpu")
    assert torch.equal(empty.one.randlora_input_scale["default"], torch.ones(24))
    empty.load_state_dict(state)
    assert torch.equal(empty(uneven(3)), calibrated()(uneven(3)))


def test_an_adapter_takes_its_vector_along():
    layer = layer_of(basis="hadamard")
    layer.update_layer("two", r=4)
    layer.set_input_scale("two", torch.rand(24) + 0.5)
    assert [name for name in layer.bases if layer.is_calibrated(name)] == ["two"]
    layer.update_layer("two", r=4)  # a new one
    assert not layer.is_calibrated("two")
    layer.update_layer("two", r=4, density=0.3)
    assert [*layer.randlora_input_scale] == ["default"]
    with pytest.raises(ValueError, match="adapter must be one of"):
        layer.is_calibrated("three")


def test_compiled_exported_and_mapped():
    model, x = calibrated().eval(), uneven(9, seed=2)
    want = model(x)
    for strict in (False, True):
        assert torch.equal(torch.export.export(model, (x,), strict=strict).module()(x), want)
    assert relative(torch.vmap(model)(x[:, None])[:, 0], want) < 1e-5
    torch._dynamo.reset()
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(fast(x), want)
    state = model.state_dict()
    state["one.randlora_input_scale.default"] = torch.rand(24) + 0.5
    for change in (
        lambda: model.one.set_input_scale("default", torch.ones(24)),
        lambda: model.load_state_dict(state),
        lambda: model.one.randlora_input_scale["default"].mul_(1.5),
    ):
        change()  # noticed
        assert torch.equal(fast(x), model(x)) and not torch.equal(model(x), want)
        want = model(x)
