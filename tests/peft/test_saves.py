"""Saves that are killed or cannot be written, and what a written file holds."""

import contextlib
import json
import os
import resource
import shutil
import signal
import sys

import pytest
import torch
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
from randlora_ext.files import appear_together
from safetensors.torch import load_file

import randlora_ext

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


# By name: what saves a model, and the model.
WRITERS = {
    "save_pretrained": lambda model, path: model.save_pretrained(path),
    "a pickle": lambda model, path: model.save_pretrained(path, safe_serialization=False),
    "export_to_peft": accelerated.export_to_peft,
    "save_adapter": lambda model, path: randlora_ext.save_adapter(model, path),
}
MODELS = {
    "save_pretrained": of_several_adapters,
    "a pickle": lambda: made(sparse=True),
    "export_to_peft": lambda: made(density=0.2),
    "save_adapter": small_net,
}


class Saves:
    """Two saves of one model into one folder; the numbers of the second are in the model."""

    def __init__(self, writer, folder):
        self.write, self.model, self.folder = WRITERS[writer], MODELS[writer](), folder
        folder.mkdir()
        self.old = self._save(4)
        self.first = folder.with_name("first")
        shutil.copytree(folder, self.first)
        self.new = self._save(5)

    def _save(self, seed):
        self.write(randomize(self.model, seed), self.folder)
        return contents(self.folder)

    def killed_before(self, change):
        """Whether the second save, over the first one, can be killed before that change."""
        shutil.rmtree(self.folder)
        shutil.copytree(self.first, self.folder)
        return killed_before(change, lambda: self.write(self.model, self.folder))

    def are_new(self):
        """Of each file whether it is that of the second save; else it is that of the first."""
        left = contents(self.folder)
        assert all(left.get(path) in (self.old[path], self.new[path]) for path in self.old)
        return [left[path] == self.new[path] for path in self.old]


@pytest.fixture(params=WRITERS)
def saves(request, tmp_path):
    return Saves(request.param, tmp_path / "folder")


def test_a_save_leaves_nothing_temporary(saves):
    assert saves.new.keys() == saves.old.keys() and saves.new != saves.old


def test_a_killed_save_leaves_whole_files(saves):
    """At whichever change of the file system it is killed."""
    done = []
    while saves.killed_before(len(done)):
        done.append(all(saves.are_new()))
    assert len(done) > 2 and not done[0] and done[-1]


def test_a_save_removes_what_a_killed_one_has_left(saves):
    assert saves.killed_before(4)
    assert len(contents(saves.folder)) > len(saves.old)
    saves.write(saves.model, saves.folder)
    assert contents(saves.folder) == saves.new


@pytest.mark.parametrize("writer", WRITERS)
def test_a_save_does_not_write_into_old_files(tmp_path, writer):
    """Which another process may have open."""
    write, model = WRITERS[writer], MODELS[writer]()
    folder = tmp_path / "folder"
    folder.mkdir()
    write(randomize(model, 4), folder)
    old = contents(folder)
    with contextlib.ExitStack() as stack:
        readers = {path: stack.enter_context((folder / path).open("rb")) for path in old}
        write(randomize(model, 5), folder)
        for path, reader in readers.items():
            assert parsed(reader.read(), path) == old[path]


def test_the_scratch_folder_of_a_living_process_stays(tmp_path):
    with appear_together(tmp_path) as one, appear_together(tmp_path) as two:
        (one / "0").touch(), (two / "1").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


# ---- what cannot be written ---------------------------------------------------------------------

OF_PEFT = pytest.mark.parametrize(
    "write", [WRITERS[name] for name in ("save_pretrained", "a pickle", "export_to_peft")]
)


@contextlib.contextmanager
def largest_file(size):
    """As on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@OF_PEFT
@pytest.mark.parametrize("room", ["for nothing", "for all but the last bytes"])
def test_on_a_full_disk_the_old_files_stay(tmp_path, write, room):
    model, folder = made(density=0.2), tmp_path / "folder"
    write(model, folder)
    files = contents(folder)
    size = 100
    if room != "for nothing":
        size = max(path.stat().st_size for path in folder.iterdir()) - 100
    with pytest.raises(OSError, match="/folder cannot be written: .*(large|full)") as caught:
        with largest_file(size):
            write(model, folder)
    assert ".randlora" not in str(caught.value)  # where it writes first
    assert contents(folder) == files and os.listdir(tmp_path) == ["folder"]


@OF_PEFT
def test_an_empty_name_is_refused(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="^'' cannot be written: the name is empty"):
        write(made(density=0.2), "")
    assert os.listdir() == []


@OF_PEFT
def test_a_link_to_a_folder_that_is_not_there_yet(tmp_path, write):
    (tmp_path / "link").symlink_to("target")
    write(made(density=0.2), tmp_path / "link")
    write(made(density=0.2), tmp_path / "folder")
    assert contents(tmp_path / "target").keys() == contents(tmp_path / "folder").keys()
    assert sorted(os.listdir(tmp_path)) == ["folder", "link", "target"]


# ---- what a file holds ---------------------------------------------------------------------------


TENSORS = "adapter_model.safetensors"
SIGNS = {"basis": "hadamard"}


@pytest.mark.parametrize("kind", [{"sparse": True}, {}], ids=["packed", "uniform"])
def test_a_file_in_float32_is_not_rounded_on_a_bf16_base(tmp_path, kind):
    stock = stock_made(**kind)
    stock.save_pretrained(tmp_path / "float32")
    accelerated.enable()
    loaded = opened(tmp_path / "float32", lambda: Deep().bfloat16())
    assert_close(deltas(loaded), deltas(stock), 1e-6)
    for mine, theirs in zip(layers(loaded), layers(stock), strict=True):
        assert all(map(torch.equal, dense_of(mine), dense_of(theirs)))
    loaded.save_pretrained(tmp_path / "again")
    first, again = (load_file(tmp_path / each / TENSORS) for each in ("float32", "again"))
    assert all(torch.equal(again[name], first[name]) for name in again)


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


CASTS = [  # each pair of values once
    ({"sparse": True}, True, torch.bfloat16, torch.bfloat16),
    ({"sparse": True}, False, torch.float16, torch.float16),
    ({"very_sparse": True}, True, torch.float16, torch.float32),
    ({"density": 0.2}, False, torch.bfloat16, torch.float32),
]


def load_anew(folder, dtype, **options):
    return opened(folder, lambda: Deep().to(dtype))


def load_over(folder, dtype, **options):
    model = made(**options).to(dtype)
    model.load_adapter(folder, "default")
    return model


@pytest.mark.parametrize("load", [load_anew, load_over])
@pytest.mark.parametrize("options,save_projection,dtype,back", CASTS, ids=str)
def test_a_round_trip_after_a_cast(tmp_path, options, save_projection, dtype, back, load):
    """The value of 16-bit bases is rounded where PEFT rounds it."""
    options = options | {"save_projection": save_projection}
    model = made(**options).to(dtype).to(back)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, back, **options)
    assert_close(deltas(loaded), deltas(model), 1e-6)
    for ours, theirs in zip(layers(loaded), layers(model), strict=True):
        bases = [one.basis_of("default", one.weight.device).dense() for one in (ours, theirs)]
        assert_close(*bases, 1e-6)
