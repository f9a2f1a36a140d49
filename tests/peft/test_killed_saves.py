"""A process that is killed while it saves leaves complete files, the old or the new ones."""

import json
import os
import shutil
import signal
import sys

import pytest
from layer_helpers import small_net
from peft_helpers import accelerated, config, made, randomize

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


SAVES = {
    "save_pretrained": (of_several_adapters, lambda model, to: model.save_pretrained(to)),
    "a pickle": (
        lambda: made(sparse=True),
        lambda model, to: model.save_pretrained(to, safe_serialization=False),
    ),
    "export_to_peft": (lambda: made(density=0.2), accelerated.export_to_peft),
    "save_adapter": (
        small_net,
        lambda model, to: randlora_ext.save_adapter(model, to / "adapter.safetensors"),
    ),
}


@pytest.mark.parametrize("make,write", SAVES.values(), ids=SAVES)
def test_killed_saves(tmp_path, make, write):
    """At every change of the file system that a save makes."""
    model, folder, first = make(), tmp_path / "folder", tmp_path / "first"
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
