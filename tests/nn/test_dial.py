"""The dial: the curve against copies whose lambda is multiplied, and where a chosen factor goes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from language_models import llama
from layer_helpers import randomize, relative

transformers = pytest.importorskip("transformers")

import randlora_ext  # noqa: E402
from randlora_ext import dial_curve, set_dial  # noqa: E402

TARGETS = ["q_proj", "down_proj"]
TEXT = [torch.arange(24).view(2, 12) % 50, torch.tensor([[3, 1]])]
TASK = [
    {"input_ids": torch.arange(start, start + 8)[None] % 50,
     "labels": torch.tensor([[-100] * (8 - count) + [7] * count])}
    for start, count in ((0, 2), (9, 5))
]  # fmt: skip


def model(**options):
    options = {"r": 4, "basis": "hadamard"} | options
    return randomize(randlora_ext.apply_randlora(llama(), TARGETS, **options)).eval()


def layers(model):
    return [m for m in model.modules() if hasattr(m, "randlora_lambda")]


def deltas(model, adapter="default"):
    return [layer.get_delta_weight(adapter).detach() for layer in layers(model)]


def loss_of(model, batches):
    """By hand: the cross entropy of every token that is a label, and their mean."""
    each = []
    for batch in batches:
        ids, labels = (
            (batch["input_ids"], batch["labels"]) if isinstance(batch, dict) else (batch, batch)
        )
        logits = model(ids).logits[:, :-1].double()
        found = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
        each.append(found[labels[:, 1:].flatten() != -100])
    return torch.cat(each).mean().item()


FACTORS = (1, 0.7, 0)


@pytest.fixture(scope="module")
def curve():
    """(the model, its points)"""
    ours = model()
    return ours, dial_curve(ours, TASK, iter(TEXT), FACTORS)


def test_points_have_the_factors_in_their_order(curve):
    assert [point.factor for point in curve[1]] == [*FACTORS]


def test_the_curve_is_that_of_copies_with_another_lambda(curve):
    ours, points = curve
    for factor, task, text in points:
        other = copy.deepcopy(ours)
        for layer in layers(other):
            layer.randlora_lambda["default"].data *= factor
        assert task == pytest.approx(loss_of(other, TASK), rel=1e-5)
        assert text == pytest.approx(loss_of(other, TEXT), rel=1e-5)
    assert points[0].task != pytest.approx(points[1].task, rel=1e-3)


def test_at_zero_is_the_base_model(curve):
    assert curve[1][2].text == pytest.approx(loss_of(llama(), TEXT), rel=1e-5)


def test_measuring_changes_nothing():
    ours = model().train()
    ours.lm_head.eval()
    modes, before = [m.training for m in ours.modules()], copy.deepcopy(ours.state_dict())
    scalings = [layer.scaling["default"] for layer in layers(ours)]
    dial_curve(ours, TASK, TEXT, FACTORS)
    assert [m.training for m in ours.modules()] == modes
    assert scalings == [layer.scaling["default"] for layer in layers(ours)]
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


def test_the_table_that_is_printed(capsys):
    points = dial_curve(model(), TASK, TEXT, FACTORS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == "factor of dW loss on the task loss on the text rise".split()
    assert lines[2].split()[:2] == ["0.7", f"{points[1].task:.3f}"]
    assert float(lines[2].split()[3]) == pytest.approx(points[1].text - points[2].text, abs=1e-3)


def test_the_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "dial.png"
    dial_curve(model(), TASK, TEXT, FACTORS, plot=plot)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_model_whose_loss_has_all_labels():
    """As that of an encoder and decoder; a causal model predicts no first token."""
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    settings = transformers.T5Config(**shape, vocab_size=50, decoder_start_token_id=0)
    ours = randlora_ext.apply_randlora(transformers.T5ForConditionalGeneration(settings), ["q"])
    batches = [{"input_ids": ids, "labels": ids.flip(1)} for ids in TEXT]
    each = []
    for batch in batches:
        logits = ours.eval()(**batch).logits.double().flatten(0, 1)
        each.append(F.cross_entropy(logits, batch["labels"].flatten(), reduction="none"))
    (point,) = dial_curve(ours, batches, batches, (1,))
    assert point.task == pytest.approx(torch.cat(each).mean().item(), rel=1e-5)


def test_functions_of_the_model_are_measured_too():
    ours, seen = model(), []

    def size(given):
        seen.append(given.training)
        return sum(float(delta.norm()) for delta in deltas(given))

    points = dial_curve(ours.train(), size, size, (1.0, 0.25))
    assert points[1].task == pytest.approx(points[0].task / 4, rel=1e-5)
    assert seen == [False] * 4 and ours.training


def test_nothing_stays_changed_if_a_measure_fails():
    ours, before = model().train(), [layer.scaling["default"] for layer in layers(model())]
    with pytest.raises(ValueError, match="input_ids"):  # the model's own
        dial_curve(ours, [{"labels": TEXT[0]}], TEXT, (0.5,))
    assert [layer.scaling["default"] for layer in layers(ours)] == before and ours.training


def merged(model):
    for layer in layers(model):
        layer.merge()
    return model


def disabled(model):
    for layer in layers(model):
        layer.disable()
    return model


@pytest.mark.parametrize(
    "change, call, error, told",
    [
        (None, lambda m: dial_curve(m, TASK, TEXT, (-1,)), ValueError, "factors must be finite"),
        (None, lambda m: dial_curve(m, TASK, TEXT, ("1",)), TypeError, "factors must be finite"),
        (None, lambda m: dial_curve(m, TASK[0], TEXT), TypeError, "task must be several batches"),
        (None, lambda m: dial_curve(m, TASK, []), ValueError, "text must hold at least one batch"),
        (None, lambda m: dial_curve(m, TASK, ["a"]), TypeError, "text must hold tensors .* 'a'"),
        (
            None,
            lambda m: dial_curve(m, [{"input_ids": TEXT[0]}], TEXT),
            ValueError,
            "task must hold .* \"labels\", got a mapping with \\['input_ids'\\]",
        ),
        (
            None,
            lambda m: dial_curve(m, [{"input_ids": TEXT[0], "labels": TEXT[0] * 0 - 100}], TEXT),
            ValueError,
            "task must have labels other than -100",
        ),
        (
            None,
            lambda m: dial_curve(m, TASK, [TEXT[0][:, :1]]),  # no token after another one
            ValueError,
            "text must have labels other than -100",
        ),
        (disabled, lambda m: dial_curve(m, TASK, TEXT), ValueError, "is not active in layer"),
        (merged, lambda m: dial_curve(m, TASK, TEXT), ValueError, "is merged; unmerge it first"),
        (merged, lambda m: set_dial(m, 0.5), ValueError, "is merged; unmerge it first"),
        (None, lambda m: set_dial(m, 0.5, "two"), ValueError, "adapter_name must be one of"),
        (None, lambda m: set_dial(m, 0), ValueError, "factor must be a positive finite number"),
        (None, lambda m: set_dial(m, torch.inf), ValueError, "must be a positive finite number"),
        (None, lambda m: set_dial(m, None), TypeError, "must be a positive finite number"),
        (lambda m: m.to("meta"), lambda m: set_dial(m, 0.5), ValueError, "no numbers here"),
    ],
)
def test_what_is_refused(change, call, error, told):
    ours = model()
    if change is not None:
        change(ours)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(error, match=told):
        call(ours)
    after = ours.state_dict()
    assert all(value.is_meta or torch.equal(value, before[key]) for key, value in after.items())


def test_a_model_without_an_adapter_is_refused():
    with pytest.raises(ValueError, match="^model has no RandLoRA adapter"):
        set_dial(llama(), 0.5)
    with pytest.raises(ValueError, match="^model has no RandLoRA adapter"):
        dial_curve(llama(), TASK, TEXT)


def test_a_factor_multiplies_dw():
    ours = model()
    before = deltas(ours)
    set_dial(ours, 0.5)  # exact
    assert all(torch.equal(now, was / 2) for now, was in zip(deltas(ours), before, strict=True))


def test_a_second_factor_multiplies_the_first():
    ours = model()
    before = deltas(ours)
    set_dial(ours, 0.5)
    set_dial(ours, 1.4)
    for now, was in zip(deltas(ours), before, strict=True):
        assert relative(now, was.double() * 0.7) < 1e-6


@pytest.fixture
def turned():
    ours = model()
    set_dial(ours, 0.7)
    return ours


def test_a_factor_goes_into_files(turned, tmp_path):
    randlora_ext.save_adapter(turned, tmp_path)
    opened = randlora_ext.load_adapter(llama(), tmp_path).eval()
    assert torch.equal(opened(TEXT[0]).logits, turned(TEXT[0]).logits)


def test_a_factor_goes_into_state_dicts(turned):
    other = model()
    other.load_state_dict(turned.state_dict())
    assert torch.equal(other(TEXT[0]).logits, turned(TEXT[0]).logits)


def test_a_factor_goes_into_merged_weights(turned):
    want = turned(TEXT[0]).logits
    merged = randlora_ext.merge_and_unload(turned)
    assert relative(merged(TEXT[0]).logits, want) < 1e-5


def test_of_one_adapter_among_several():
    ours = model()
    for layer in layers(ours):
        layer.update_layer("two", r=4, basis="hadamard")
    randomize(ours)
    one, two = deltas(ours), deltas(ours, "two")
    set_dial(ours, 0.5, "two")
    assert all(map(torch.equal, deltas(ours), one))
    assert all(torch.equal(now, was / 2) for now, was in zip(deltas(ours, "two"), two, strict=True))
