"""Saves that are killed, torn, refused or read at the same time; what a file holds."""

import contextlib
import itertools
import json
import os
import resource
import shutil
import signal
import sys
from collections import Counter

import pytest
import torch
from cli_helpers import llama, run
from layer_helpers import small_net
from peft.tuners.randlora.model import RandLoraModel
from peft_helpers import (
    Deep,
    accelerated,
    assert_close,
    config,
    deltas,
    dense_of,
    layers,
    made,
    opened,
    randomize,
    stock_made,
)
from safetensors.torch import load_file, save_file

import randlora_ext
from randlora_ext.files import appear_together
from randlora_ext.nn.adapter_record import RECORD_KEY, record_of, record_tensor

transformers = pytest.importorskip("transformers")

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")


def killed_before(change, save):
    """Forks a child that saves. It dies before that change of the file system, if there is one."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL), f"the save failed: {code}"
        return code != 0
    seen, code = 0, 1

    def watch(event, arguments):
        nonlocal seen
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in CHANGES:
            if seen == change:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    try:
        signal.alarm(60)
        sys.addaudithook(watch)
        save()
        code = 0
    finally:
        os._exit(code)


def parsed(data, name):
    """Equal for equal files; safetensors writes the entries of its header in any order."""
    if name.suffix != ".safetensors":
        return data
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {p.relative_to(folder): parsed(p.read_bytes(), p) for p in files}


def of_several_adapters():
    model = made(basis="independent", density=0.2)
    model.add_adapter("two", config(5, accelerated.RandLoraConfig, density=0.1))
    return model


WRITERS = {
    "save_pretrained": lambda model, path: model.save_pretrained(path),
    "a pickle": lambda model, path: model.save_pretrained(path, safe_serialization=False),
    "export_to_peft": accelerated.export_to_peft,
    "save_adapter": lambda model, to: randlora_ext.save_adapter(model, to),
}
SAVES = {
    "save_pretrained": of_several_adapters,
    "a pickle": lambda: made(sparse=True),
    "export_to_peft": lambda: made(density=0.2),
    "save_adapter": small_net,
}


@pytest.mark.parametrize("name", SAVES)
def test_killed_saves(tmp_path, name):
    """At every change of the file system that a save makes."""
    write, model = WRITERS[name], SAVES[name]()
    folder, first = tmp_path / "folder", tmp_path / "first"
    folder.mkdir()
    write(randomize(model, 4), folder)
    old = contents(folder)
    shutil.copytree(folder, first)
    readers = {path: (folder / path).open("rb") for path in old}
    write(randomize(model, 5), folder)
    new = contents(folder)
    for path, reader in readers.items():
        with reader:
            assert parsed(reader.read(), path) == old[path], "an old file is written to"
    assert new.keys() == old.keys() and new != old  # nothing temporary stays

    def killed(change):
        shutil.rmtree(folder)
        shutil.copytree(first, folder)
        return killed_before(change, lambda: write(model, folder))

    renamed = []
    while killed(len(renamed)):
        left = contents(folder)
        assert all(left.get(path) in (old[path], new[path]) for path in old)
        renamed.append(all(left[path] == new[path] for path in old))
    assert not renamed[0] and renamed[-1]
    assert killed(len(renamed) // 2)
    write(model, folder)  # removes what is left over
    assert contents(folder) == new


TENSORS = "adapter_model.safetensors"


@pytest.mark.parametrize("kind", [{"sparse": True}, {}], ids=["packed", "uniform"])
def test_a_file_in_float32_is_not_rounded_on_a_bf16_base(tmp_path, kind):
    stock = stock_made(**kind)
    stock.save_pretrained(tmp_path / "float32")
    accelerated.enable()
    loaded = opened(tmp_path / "float32", lambda: Deep().bfloat16())
    assert_close(deltas(loaded), deltas(stock), 1e-6)
    for mine, theirs in zip(layers(loaded), layers(stock), strict=True):
        assert all(map(torch.equal, dense_of(mine), dense_of(theirs)))
    loaded.save_pretrained(tmp_path)
    first, again = (load_file(tmp_path / each / TENSORS) for each in ("float32", ""))
    assert all(torch.equal(again[name], first[name]) for name in again)


SIGNS = {"basis": "hadamard"}
TORN = {
    "seed": (SIGNS, SIGNS | {"projection_prng_key": 2}, "key of .*hadamard-1:seed=2', not .*=0'"),
    "alpha": (SIGNS, SIGNS | {"randlora_alpha": 9}, "randlora_alpha of the tensors is 9, not 640"),
    "density": ({"density": 0.07}, {"basis": "independent"}, "independent-1:density=0.333"),
    "kind": (SIGNS, {"basis": "independent"}, "independent-1:.*, not .*hadamard-1:seed=0'"),
    "r": ({"r": 5, **SIGNS}, {"r": 6, **SIGNS}, "r of the tensors is 6, not 5"),
}


@pytest.mark.parametrize("old,new,message", TORN.values(), ids=TORN)
def test_tensors_of_another_save(tmp_path, old, new, message, x):
    """As a save leaves them that was killed between its files."""
    made(**old).save_pretrained(tmp_path)
    made(seed=2, **new).save_pretrained(tmp_path / "new")
    shutil.copy(tmp_path / "new" / TENSORS, tmp_path)
    base, running = Deep(), made(seed=4, **old)
    before = running(x)
    for door in (
        lambda: opened(tmp_path, lambda: base),
        lambda: running.load_adapter(tmp_path, "two"),
        lambda: running.load_adapter(tmp_path, "default"),
        lambda: accelerated.hotswap_adapter(running, tmp_path),
    ):
        with pytest.raises((ValueError, RuntimeError), match=rf"(?s){message}") as told:
            door()
        assert "save the adapter again" in str(told.value)
        assert str(tmp_path) in str(told.value) or "was not read from a folder" in str(told.value)
    assert torch.equal(base(x), Deep()(x)) and torch.equal(running(x), before)


def test_a_message_tells_the_first_misfits_their_number_and_what_to_do(tmp_path):
    """Once, at the end, however many layers there are."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    options = {"base": llama, "targets": names, **SIGNS}
    made(r=6, **options).save_pretrained(tmp_path)  # twelve layers
    running = made(r=5, **options)
    with pytest.raises(RuntimeError, match="r of the tensors is 6, not 5") as other_r:
        running.load_adapter(tmp_path, "default")
    tensors = load_file(tmp_path / TENSORS)
    records = [key for key in tensors if key.endswith(RECORD_KEY)]
    for key in records:
        tensors[key] = tensors[key] * 0
    save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(RuntimeError, match="is no record of an adapter") as damaged:
        running.load_adapter(tmp_path, "two")
    for told, count in ((other_r, 2 * len(records) + 1), (damaged, len(records))):
        _, *problems, advice = str(told.value).split("\n\t")
        assert advice.startswith("the adapter's configuration was")
        assert not any("configuration" in problem for problem in problems)
        assert len(problems) == 11 and problems[-1] == f"and {count - 10} more"


@pytest.mark.parametrize("kind", [{"basis": "independent"}, SIGNS], ids=str)
def test_transformers_own_loaders(tmp_path, kind, caplog):
    """They report nothing, and refuse the tensors of another save."""
    ids = torch.arange(6).view(1, 6)
    llama().save_pretrained(tmp_path / "base")
    for seed, key in ((1, 3), (2, 4)):
        options = {"base": llama, "targets": ["q_proj"], "task_type": "CAUSAL_LM", **kind}
        model = made(seed, projection_prng_key=key, **options)
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        model.save_pretrained(tmp_path / str(seed))
    wanted = model(ids).logits
    opener = transformers.AutoModelForCausalLM
    for opened_by in (
        lambda folder: opener.from_pretrained(folder),
        lambda folder: (one := llama()).load_adapter(folder) and one,
    ):
        assert torch.equal(opened_by(str(tmp_path / "2"))(ids).logits, wanted)
        assert "UNEXPECTED" not in caplog.text and "MISSING" not in caplog.text
        shutil.copy(tmp_path / "1" / TENSORS, tmp_path / "3")
        shutil.copytree(tmp_path / "2", tmp_path / "torn", dirs_exist_ok=True)
        shutil.copy(tmp_path / "1" / TENSORS, tmp_path / "torn")
        with pytest.raises(RuntimeError, match=r"(?s)seed=3', not .*seed=4'.*save the adapter aga"):
            opened_by(str(tmp_path / "torn"))


def test_tensors_without_a_record_are_told(tmp_path):
    """What PEFT opens it opens with a warning; hotswap_adapter refuses."""
    model = made(**SIGNS)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    bare = {key: each for key, each in tensors.items() if not key.endswith(RECORD_KEY)}
    assert len(bare) == 3 * len(tensors) / 4
    save_file(bare, tmp_path / TENSORS)
    with pytest.warns(UserWarning, match="missing adapter keys.*a.randlora_record.default"):
        opened(tmp_path)
    with pytest.raises(ValueError, match=r"\w\.randlora_record\._extra_state is missing"):
        accelerated.hotswap_adapter(model, tmp_path)


@pytest.mark.skipif(
    not hasattr(RandLoraModel, "_get_adapter_state_dict"), reason="PEFT 0.20 has no such hook"
)
def test_a_state_of_parameters_and_buffers_is_saved_with_records(tmp_path):
    """DeepSpeed's ZeRO-3 gathers these alone."""
    model = made(**SIGNS)
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    model.save_pretrained(tmp_path / "gathered", state_dict=state)
    model.save_pretrained(tmp_path / "usual")
    gathered, usual = (load_file(tmp_path / name / TENSORS) for name in ("gathered", "usual"))
    assert gathered.keys() == usual.keys()
    assert all(torch.equal(gathered[key], usual[key]) for key in usual)


HOSTILE = {
    "no record": torch.zeros(5, dtype=torch.uint8),
    "numbers": torch.zeros(5),
    "no object": torch.tensor([*b"[7]"], dtype=torch.uint8),
    "other fields": torch.tensor([*b'{"r": 5}'], dtype=torch.uint8),
    "deep": torch.tensor([*b"[" * 100_000], dtype=torch.uint8),
    "other types": record_tensor(record_of(["x"], {}, None, "abc"), 8, 4),
}


@pytest.mark.parametrize("record", HOSTILE.values(), ids=HOSTILE)
def test_hostile_records(tmp_path, record, x):
    model = made(**SIGNS)
    model.save_pretrained(tmp_path)
    before = model(x)
    tensors = load_file(tmp_path / TENSORS)
    tensors[f"base_model.model.c.{RECORD_KEY}"] = record
    save_file(tensors, tmp_path / TENSORS)
    for door in (
        lambda: opened(tmp_path),
        lambda: model.load_adapter(tmp_path, "default"),
        lambda: accelerated.hotswap_adapter(model, tmp_path),
    ):
        with pytest.raises((ValueError, RuntimeError), match="(no record|of the tensors is)"):
            door()
    assert torch.equal(model(x), before)


def test_the_scratch_folder_of_a_living_process_stays(tmp_path):
    with appear_together(tmp_path) as one, appear_together(tmp_path) as two:
        (one / "0").touch(), (two / "1").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


@pytest.mark.parametrize("write", list(WRITERS.values())[:-1], ids=list(WRITERS)[:-1])
def test_what_cannot_be_written(tmp_path, monkeypatch, write):
    """A full disk and bad names: one kind of error, and the old files stay."""
    model = made(density=0.2)
    write(model, tmp_path / "folder")
    files = contents(tmp_path / "folder")
    largest = max(path.stat().st_size for path in (tmp_path / "folder").iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (100, largest - 100):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(OSError, match="/folder cannot be written: .*(large|full)") as told:
                write(model, tmp_path / "folder")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert ".randlora" not in str(told.value)
        assert contents(tmp_path / "folder") == files
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="^'' cannot be written: the name is empty"):
        write(model, "")
    (tmp_path / "link").symlink_to("target")
    write(model, "link")
    assert contents(tmp_path / "target").keys() == files.keys()
    assert sorted(os.listdir()) == ["folder", "link", "target"]


CASTS = [  # each pair of values once
    ({"sparse": True}, True, torch.bfloat16, torch.bfloat16),
    ({"sparse": True}, False, torch.float16, torch.float16),
    ({"very_sparse": True}, True, torch.float16, torch.float32),
    ({"density": 0.2}, False, torch.bfloat16, torch.float32),
]


@pytest.mark.parametrize("options,save_projection,dtype,back", CASTS, ids=str)
def test_a_round_trip_after_a_cast(tmp_path, options, save_projection, dtype, back):
    """The value of 16-bit bases is rounded where PEFT rounds it."""
    model = made(save_projection=save_projection, **options).to(dtype).to(back)
    model.save_pretrained(tmp_path)
    new = opened(tmp_path, lambda: Deep().to(back))
    over = made(save_projection=save_projection, **options).to(back)
    over.load_adapter(tmp_path, "default")
    for loaded in (new, over):
        assert_close(deltas(loaded), deltas(model), 1e-6)
        for ours, theirs in zip(layers(loaded), layers(model), strict=True):
            pair = (one.basis_of("default", one.weight.device).dense() for one in (ours, theirs))
            assert_close(*pair, 1e-6)


LOADS = 60  # of each door


@contextlib.contextmanager
def saving(folder, models):
    """Another process saves one model after the other, until the block ends."""
    if not (child := os.fork()):
        try:
            signal.alarm(600)
            for model in itertools.cycle(models):
                model.save_pretrained(folder)
        finally:
            os._exit(1)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def anew(folder, model, x):
    return opened(folder)(x)


def new(folder, model, x):
    if "new" in model.peft_config:
        model.delete_adapter("new")
    model.load_adapter(folder, "new")
    model.set_adapter("new")
    return model(x)


def over(folder, model, x):
    model.load_adapter(folder, "default")
    return model(x)


def hotswap(folder, model, x):
    accelerated.hotswap_adapter(model, folder)
    return model(x)


def merge(folder, model, x):
    """By the command line, without a model."""
    code, _, error = run("merge", folder / "base", folder, folder / "out")
    if code:
        raise ValueError(error)
    merged = load_file(folder / "out/model.safetensors")
    shutil.rmtree(folder / "out")
    return torch.cat([tensor.flatten() for tensor in merged.values()])


# What differs between the adapters: hotswap wants the same bases.
KEY = {"projection_prng_key": 2, "randlora_alpha": 50}
DOORS = {anew: KEY, new: KEY, over: KEY, hotswap: {"randlora_alpha": 50}, merge: KEY}


@pytest.mark.filterwarnings("ignore:randlora_alpha of")
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
@torch.no_grad()
def test_no_load_is_mixed(tmp_path, door):
    options, x = {"basis": "hadamard", "randlora_alpha": 100}, torch.randn(6, 24)
    if door is merge:
        options |= {"base": llama, "targets": ["q_proj"]}
        llama().save_pretrained(tmp_path / "base")
    models = [made(1, **options), made(2, **options | DOORS[door])]
    reader, wanted, seen = made(1, **options), [], Counter()
    for model in models:
        model.save_pretrained(tmp_path)
        wanted.append(merge(tmp_path, model, x) if door is merge else model(x))
    models[0].save_pretrained(tmp_path)
    with saving(tmp_path, models):
        for _ in range(LOADS // 2 if door is merge else LOADS):
            try:
                y = door(tmp_path, reader, x)
            except (ValueError, RuntimeError) as error:
                # The last one is of safetensors, which opens a file twice.
                told = "save the adapter again", "does not fit", "required mapping size"
                assert any(words in str(error) for words in told), error
                seen["refused"] += 1
                continue
            (which,) = [i for i, want in enumerate(wanted) if torch.equal(y, want)] or ["mixed"]
            seen[which] += 1
    assert seen[0] and (seen[1] or door is over) and not seen["mixed"], seen
