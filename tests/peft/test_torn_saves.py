"""Files of two saves, cut off or hostile: refused before anything is copied, by every door."""

import re
import shutil

import pytest
import torch
from language_models import llama
from peft.utils.save_and_load import load_peft_weights
from peft_helpers import (
    Deep,
    assert_unchanged,
    made,
    numbers,
    opened,
    peft,
)
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
SIGNS = {"basis": "hadamard"}
RECORD = "randlora_record._extra_state"


def set_tensors(folder, base, running):
    peft.set_peft_model_state_dict(running, load_peft_weights(folder, device="cpu"))


def inject(folder, base, running):
    model = peft.inject_adapter_in_model(peft.PeftConfig.from_pretrained(folder), base)
    set_tensors(folder, base, model)


# By name, what opens a folder; `running` is a model that has the adapter "default" already.
DOORS = {
    "from_pretrained": lambda folder, base, running: opened(folder, lambda: base),
    "low_cpu_mem_usage": lambda folder, base, running: opened(
        folder, lambda: base, low_cpu_mem_usage=True
    ),
    "load_adapter": lambda folder, base, running: running.load_adapter(folder, "two"),
    "load_adapter over": lambda folder, base, running: running.load_adapter(folder, "default"),
    "set_peft_model_state_dict": set_tensors,
    "injected": inject,
}
EVERY_DOOR = pytest.mark.parametrize("door", DOORS)
READ_THE_CONFIGURATION = ["from_pretrained", "low_cpu_mem_usage", "load_adapter"]  # by our class


class Folder:
    """A saved adapter, what opens it, a plain model and one that has the adapter already."""

    def __init__(self, path, **options):
        self.path, self.base = path, Deep()
        self.running = made(seed=4, **options)
        made(**options).save_pretrained(path)
        self.before = numbers(self.running)

    def refused(self, door):
        """What the error says; nothing that was there has changed, and a new adapter is zero."""
        with pytest.raises((ValueError, RuntimeError, OSError)) as caught:
            DOORS[door](self.path, self.base, self.running)
        for model in (self.base, self.running):
            for name, lam in model.named_parameters():
                if "randlora_lambda" in name and name not in self.before:
                    assert lam.is_meta or not lam.any()
        now = self.running.state_dict()
        assert all(torch.equal(now[name], value) for name, value in self.before.items())
        own = [p for name, p in self.base.named_parameters() if "randlora_" not in name]
        assert all(map(torch.equal, own, Deep().parameters()))
        return str(caught.value)

    def write(self, **tensors):
        """Changes tensors by the ends of their names; None takes one away."""
        saved = load_file(self.path / TENSORS)
        for end, tensor in tensors.items():
            (key,) = [key for key in saved if key.endswith(end)]
            saved[key] = tensor
        save_file({k: t for k, t in saved.items() if t is not None}, self.path / TENSORS)


# ---- files of two saves --------------------------------------------------------------------------

TORN = {
    "seed": (SIGNS, SIGNS | {"projection_prng_key": 2}, "key of .*hadamard-1:seed=2', not .*=0'"),
    "alpha": (SIGNS, SIGNS | {"randlora_alpha": 9}, "randlora_alpha of the tensors is 9, not 640"),
    "density": ({"density": 0.07}, {"basis": "independent"}, "independent-1:density=0.333"),
    "kind": (SIGNS, {"basis": "independent"}, "independent-1:.*, not .*hadamard-1:seed=0'"),
    "r": ({"r": 5, **SIGNS}, {"r": 6, **SIGNS}, "r of the tensors is 6, not 5"),
}


@pytest.mark.filterwarnings("ignore:(Already found|Found missing)")
@EVERY_DOOR
@pytest.mark.parametrize("old, new, message", TORN.values(), ids=TORN)
def test_tensors_of_another_save(tmp_path, old, new, message, door):
    """As a save leaves them that was killed between its files."""
    folder = Folder(tmp_path, **old)
    made(seed=2, **new).save_pretrained(tmp_path / "new")
    shutil.copy(tmp_path / "new" / TENSORS, tmp_path)
    told = folder.refused(door)
    assert re.search(f"(?s){message}", told)
    assert "the files are of two saves" in told
    assert (str(tmp_path) in told) == (door in READ_THE_CONFIGURATION)


def test_a_folder_is_named_only_for_the_configuration(tmp_path):
    """PEFT does not tell from which folder tensors come that are loaded over an adapter."""
    for name, key in (("one", 1), ("two", 2)):
        made(projection_prng_key=key, **SIGNS).save_pretrained(tmp_path / name)
    model = opened(tmp_path / "one")
    said = rf"adapter 'default' \(its configuration is from {tmp_path}/one\) does not fit"
    with pytest.raises(RuntimeError, match=said):
        model.load_adapter(tmp_path / "two", "default")


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def test_a_message_tells_ten_misfits_and_their_number(tmp_path):
    made(r=6, base=llama, targets=LINEAR, **SIGNS).save_pretrained(tmp_path)
    running = made(r=5, base=llama, targets=LINEAR, **SIGNS)
    with pytest.raises(RuntimeError, match="r of the tensors is 6, not 5") as error:
        running.load_adapter(tmp_path, "default")
    _, first, *shown = re.split(r"\n\t(?=\S+ is \(|\d|the tensors)", str(error.value))
    assert len(shown) == 10
    assert first == f"{2 * 12 + 1 - 10} more, and" and shown[-1].startswith("the tensors do not")


# ---- one plain state dict ------------------------------------------------------------------------


@pytest.mark.parametrize("options, message", [(TORN["seed"][1], "seed=2', not .*seed=0'")])
def test_a_plain_state_dict_is_refused_layer_by_layer(options, message):
    """As torch does it: each layer as a whole, and those before it have been loaded."""
    model, other = made(**SIGNS), made(seed=2, **options)
    before = numbers(model)
    with pytest.raises(RuntimeError, match=rf"(?s)the state dict of \S*a does not fit:.*{message}"):
        model.load_state_dict(other.state_dict())
    assert_unchanged(model, before)


def test_a_plain_state_dict_that_misfits_in_the_last_layer():
    model, other = made(**SIGNS), made(seed=2, **SIGNS)
    before, state = numbers(model), other.state_dict()
    (key,) = [key for key in state if key.endswith("c.randlora_gamma.default")]
    state[key] = state[key][:1]
    with pytest.raises(RuntimeError, match=r"(?s)the state dict of \S*c does not fit:.*gamma"):
        model.load_state_dict(state)
    now = model.state_dict()
    changed = {name for name in before if not torch.equal(now[name], before[name])}
    assert changed and not [name for name in changed if ".c." in name]


# ---- files that are cut off ----------------------------------------------------------------------


@EVERY_DOOR
@pytest.mark.parametrize("left", [0, 7, 100, -1], ids=lambda left: f"{left} bytes")
def test_a_file_that_is_cut_off(tmp_path, left, door):
    folder = Folder(tmp_path, **SIGNS)
    tensors = tmp_path / TENSORS
    tensors.write_bytes(tensors.read_bytes()[:left])
    with pytest.raises(Exception) as caught:  # of safetensors, or ours
        DOORS[door](tmp_path, folder.base, folder.running)
    if door in READ_THE_CONFIGURATION:
        assert f"{tensors} is damaged" in str(caught.value)
        assert list(folder.running.peft_config) == ["default"]
    assert_unchanged(folder.running, folder.before)


@pytest.mark.parametrize("door", [*READ_THE_CONFIGURATION, "injected"])
def test_a_configuration_that_is_cut_off(tmp_path, door):
    folder = Folder(tmp_path, **SIGNS)
    config = tmp_path / CONFIG
    config.write_bytes(config.read_bytes()[:-20])
    with pytest.raises(ValueError, match="Expecting|Unterminated|delimiter"):  # of json
        DOORS[door](tmp_path, folder.base, folder.running)
    assert_unchanged(folder.running, folder.before)


# ---- tensors that do not fit ---------------------------------------------------------------------

MISFITS = {
    "shape": ("c.randlora_gamma", torch.ones(3, 24), r"c\.randlora_gamma\S* is \(3, 24\), and"),
    "dtype": ("c.randlora_lambda", torch.ones(5, 5, dtype=torch.int32), "and must be floating"),
    "NaN": ("b.randlora_input_scale", torch.full([40], torch.nan), "positive and finite in every"),
    "zero": ("a.randlora_input_scale", torch.zeros(24), "positive and finite in every feature"),
    "no scale": ("c.randlora_input_scale", None, r"c\.randlora_input_scale\S* is missing: an adap"),
}


@pytest.mark.filterwarnings("ignore:(Already found|Found missing)")
@EVERY_DOOR
@pytest.mark.parametrize("case", MISFITS)
def test_tensors_that_do_not_fit(tmp_path, case, door):
    end, tensor, message = MISFITS[case]
    folder = Folder(tmp_path, **SIGNS)
    folder.write(**{end: tensor})
    told = folder.refused(door)
    assert re.search(message, told)
    assert (str(tmp_path) in told) == (door in READ_THE_CONFIGURATION)


# ---- records that are missing or wrong -----------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Already found")
@EVERY_DOOR
def test_tensors_without_a_record(tmp_path, door):
    folder = Folder(tmp_path, **SIGNS)
    folder.write(**{f"b.{RECORD}": None})
    assert re.search(r"b\.randlora_record\S* is missing", folder.refused(door))


HOSTILE = {
    "no record": torch.zeros(5, dtype=torch.uint8),
    "numbers": torch.zeros(5),
    "no object": torch.tensor([*b"[7]"], dtype=torch.uint8),
    "other fields": torch.tensor([*b'{"r": 5}'], dtype=torch.uint8),
    "deep": torch.tensor([*b"[" * 100_000], dtype=torch.uint8),
    "other types": torch.tensor(
        [*b'{"projection_prng_key": [], "r": null, "randlora_alpha": "x", "in_features": {}, '
         b'"out_features": 4}'], dtype=torch.uint8
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Already found")
@EVERY_DOOR
@pytest.mark.parametrize("record", HOSTILE)
def test_hostile_records(tmp_path, record, door):
    folder = Folder(tmp_path, **SIGNS)
    folder.write(**{f"c.{RECORD}": HOSTILE[record]})
    assert re.search("(no record|of the tensors is)", folder.refused(door))


# ---- transformers' own loaders -------------------------------------------------------------------

IDS = torch.arange(6).view(1, 6)


@pytest.fixture(params=[{"basis": "independent"}, SIGNS], ids=str)
def two_saves(request, tmp_path):
    """Two adapters, in the folders "1" and "2", and the logits of the second."""
    return saved_twice(tmp_path, request.param)


def saved_twice(folder, kind):
    llama().save_pretrained(folder / "base")
    for seed, key in ((1, 3), (2, 4)):
        options = {"base": llama, "targets": ["q_proj"], "task_type": "CAUSAL_LM", **kind}
        model = made(seed, projection_prng_key=key, **options)
        model.peft_config["default"].base_model_name_or_path = str(folder / "base")
        model.save_pretrained(folder / str(seed))
    return model(IDS).logits


def by_auto_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(str(folder))


def by_load_adapter(folder):
    model = llama()
    model.load_adapter(str(folder))
    return model


BY_TRANSFORMERS = pytest.mark.parametrize("open_by", [by_auto_model, by_load_adapter])


@BY_TRANSFORMERS
def test_transformers_opens_a_save_and_reports_nothing(tmp_path, two_saves, caplog, open_by):
    assert torch.equal(open_by(tmp_path / "2")(IDS).logits, two_saves)
    assert "UNEXPECTED" not in caplog.text and "MISSING" not in caplog.text


@BY_TRANSFORMERS
def test_transformers_refuses_tensors_of_another_save(tmp_path, two_saves, open_by):
    shutil.copy(tmp_path / "1" / TENSORS, tmp_path / "2")
    with pytest.raises(RuntimeError, match=r"(?s)seed=3', not .*seed=4'") as caught:
        open_by(tmp_path / "2")
    assert "the files are of two saves" in caught.value.args[0]
    assert "was not read from a folder" not in caught.value.args[0]


@BY_TRANSFORMERS
@pytest.mark.parametrize("number", [torch.nan, 0.0, -1.0, torch.inf])
def test_transformers_refuses_an_input_scale_that_is_none(tmp_path, open_by, number):
    saved_twice(tmp_path, SIGNS)
    tensors = load_file(tmp_path / "2" / TENSORS)
    key = next(key for key in tensors if key.endswith("randlora_input_scale"))
    tensors[key][3] = number
    save_file(tensors, tmp_path / "2" / TENSORS)
    with pytest.raises((ValueError, RuntimeError), match="positive and finite in every feature"):
        open_by(tmp_path / "2")
