"""Tensors beside the configuration of another save, without records, or with hostile ones."""

import shutil

import pytest
import torch
from language_models import llama
from peft_helpers import (
    Deep,
    accelerated,
    made,
    opened,
)
from safetensors.torch import load_file, save_file

from randlora_ext.nn.adapter_record import RECORD_KEY, record_of, record_tensor

transformers = pytest.importorskip("transformers")

TENSORS = "adapter_model.safetensors"
SIGNS = {"basis": "hadamard"}

# By name, what opens a folder; `running` is a model that has the adapter already.
DOORS = {
    "from_pretrained": lambda folder, base, running: opened(folder, lambda: base),
    "load_adapter": lambda folder, base, running: running.load_adapter(folder, "two"),
    "load_adapter over": lambda folder, base, running: running.load_adapter(folder, "default"),
    "hotswap_adapter": lambda folder, base, running: accelerated.hotswap_adapter(running, folder),
}
TORN = {
    "seed": (SIGNS, SIGNS | {"projection_prng_key": 2}, "key of .*hadamard-1:seed=2', not .*=0'"),
    "alpha": (SIGNS, SIGNS | {"randlora_alpha": 9}, "randlora_alpha of the tensors is 9, not 640"),
    "density": ({"density": 0.07}, {"basis": "independent"}, "independent-1:density=0.333"),
    "kind": (SIGNS, {"basis": "independent"}, "independent-1:.*, not .*hadamard-1:seed=0'"),
    "r": ({"r": 5, **SIGNS}, {"r": 6, **SIGNS}, "r of the tensors is 6, not 5"),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("old,new,message", TORN.values(), ids=TORN)
def test_tensors_of_another_save(tmp_path, old, new, message, door, x):
    """As a save leaves them that was killed between its files."""
    made(**old).save_pretrained(tmp_path)
    made(seed=2, **new).save_pretrained(tmp_path / "new")
    shutil.copy(tmp_path / "new" / TENSORS, tmp_path)
    base, running = Deep(), made(seed=4, **old)
    before = running(x)
    with pytest.raises((ValueError, RuntimeError), match=rf"(?s){message}") as caught:
        DOORS[door](tmp_path, base, running)
    told = str(caught.value)
    assert "save the adapter again" in told
    assert str(tmp_path) in told or "was not read from a folder" in told
    assert torch.equal(base(x), Deep()(x)) and torch.equal(running(x), before)


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


@pytest.fixture
def many_layers(tmp_path):
    """The tensors of an adapter of twelve layers, which is in the folder."""
    made(r=6, base=llama, targets=LINEAR, **SIGNS).save_pretrained(tmp_path)
    return load_file(tmp_path / TENSORS)


def assert_tells_ten_of(count, error):
    """And once, at the end, what to do."""
    _, *problems, advice = str(error.value).split("\n\t")
    assert advice.startswith("the adapter's configuration was")
    assert not any("configuration" in problem for problem in problems)
    assert len(problems) == 11 and problems[-1] == f"and {count - 10} more"


def test_a_message_tells_the_first_misfits_and_their_number(tmp_path, many_layers):
    running = made(r=5, base=llama, targets=LINEAR, **SIGNS)
    with pytest.raises(RuntimeError, match="r of the tensors is 6, not 5") as error:
        running.load_adapter(tmp_path, "default")
    assert_tells_ten_of(2 * 12 + 1, error)


def test_a_message_tells_the_first_damaged_records_and_their_number(tmp_path, many_layers):
    for key in many_layers:
        if key.endswith(RECORD_KEY):
            many_layers[key] = many_layers[key] * 0
    save_file(many_layers, tmp_path / TENSORS)
    running = made(r=5, base=llama, targets=LINEAR, **SIGNS)
    with pytest.raises(RuntimeError, match="is no record of an adapter") as error:
        running.load_adapter(tmp_path, "two")
    assert_tells_ten_of(12, error)


# ---- transformers' own loaders -------------------------------------------------------------------


@pytest.fixture(params=[{"basis": "independent"}, SIGNS], ids=str)
def two_saves(request, tmp_path):
    """Two adapters, in the folders "1" and "2", and the logits of the second."""
    llama().save_pretrained(tmp_path / "base")
    for seed, key in ((1, 3), (2, 4)):
        options = {"base": llama, "targets": ["q_proj"], "task_type": "CAUSAL_LM", **request.param}
        model = made(seed, projection_prng_key=key, **options)
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        model.save_pretrained(tmp_path / str(seed))
    return model(IDS).logits


IDS = torch.arange(6).view(1, 6)


def by_auto_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(str(folder))


def by_load_adapter(folder):
    model = llama()
    model.load_adapter(str(folder))
    return model


@pytest.mark.parametrize("open_by", [by_auto_model, by_load_adapter])
def test_transformers_opens_a_save_and_reports_nothing(tmp_path, two_saves, caplog, open_by):
    assert torch.equal(open_by(tmp_path / "2")(IDS).logits, two_saves)
    assert "UNEXPECTED" not in caplog.text and "MISSING" not in caplog.text


@pytest.mark.parametrize("open_by", [by_auto_model, by_load_adapter])
def test_transformers_refuses_tensors_of_another_save(tmp_path, two_saves, open_by):
    shutil.copy(tmp_path / "1" / TENSORS, tmp_path / "2")
    with pytest.raises(RuntimeError, match=r"(?s)seed=3', not .*seed=4'.*save the adapter again"):
        open_by(tmp_path / "2")


# ---- records that are missing or wrong -----------------------------------------------------------


@pytest.fixture
def without_records(tmp_path):
    made(**SIGNS).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    bare = {key: each for key, each in tensors.items() if not key.endswith(RECORD_KEY)}
    assert len(bare) == 3 * len(tensors) / 4
    save_file(bare, tmp_path / TENSORS)
    return tmp_path


def test_peft_opens_tensors_without_records_with_a_warning(without_records):
    with pytest.warns(UserWarning, match="missing adapter keys.*a.randlora_record.default"):
        opened(without_records)


def test_hotswap_adapter_refuses_tensors_without_records(without_records):
    with pytest.raises(ValueError, match=r"\w\.randlora_record\._extra_state is missing"):
        accelerated.hotswap_adapter(made(**SIGNS), without_records)


HOSTILE = {
    "no record": torch.zeros(5, dtype=torch.uint8),
    "numbers": torch.zeros(5),
    "no object": torch.tensor([*b"[7]"], dtype=torch.uint8),
    "other fields": torch.tensor([*b'{"r": 5}'], dtype=torch.uint8),
    "deep": torch.tensor([*b"[" * 100_000], dtype=torch.uint8),
    "other types": record_tensor(record_of(["x"], {}, None, "abc"), 8, 4),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("record", HOSTILE.values(), ids=HOSTILE)
def test_hostile_records(tmp_path, record, door, x):
    model = made(**SIGNS)
    model.save_pretrained(tmp_path)
    before = model(x)
    tensors = load_file(tmp_path / TENSORS)
    tensors[f"base_model.model.c.{RECORD_KEY}"] = record
    save_file(tensors, tmp_path / TENSORS)
    with pytest.raises((ValueError, RuntimeError), match="(no record|of the tensors is)"):
        DOORS[door](tmp_path, Deep(), model)
    assert torch.equal(model(x), before)
