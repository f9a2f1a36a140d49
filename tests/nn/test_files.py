"""`randlora_ext.files`: what is replaced, and what never is."""

import os
import socket
import stat

import pytest
from layer_helpers import small_net

from randlora_ext import save_adapter
from randlora_ext.files import appear, appear_together


def write_file(path):
    with appear(path) as scratch:
        scratch.write_text("new")


def write_folder(path):
    with appear(path) as scratch:
        scratch.mkdir()


def write_into(path):
    with appear_together(path) as scratch:
        (scratch / "config.json").write_text("new")
        (scratch / "a.safetensors").write_text("new")


WRITERS = {
    "file": write_file,
    "folder": write_folder,
    "files": write_into,
    "save_adapter": lambda path: save_adapter(small_net(), path),
}


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # whose length is limited


SPECIAL = {"fifo": os.mkfifo, "socket": make_socket}


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("special_file", SPECIAL)
@pytest.mark.parametrize("writer", WRITERS)
def test_special_files_stay(tmp_path, monkeypatch, writer, special_file, linked):
    """A rename would replace them by a plain file, a device as well."""
    monkeypatch.chdir(tmp_path)
    path = special = tmp_path / "special"
    SPECIAL[special_file](special)
    before = special.stat()
    if linked:
        (path := tmp_path / "link").symlink_to(special)
    with pytest.raises(OSError, match=f"^{path} cannot be written: .*special is neither a regular"):
        WRITERS[writer](path)
    assert special.stat() == before and not stat.S_ISREG(before.st_mode)
    with pytest.raises(OSError, match=f"^{path}/below cannot be written: .*Not a directory"):
        WRITERS[writer](path / "below")
    assert sorted(os.listdir()) == (["link", "special"] if linked else ["special"])


@pytest.mark.parametrize("linked", [False, True])
def test_a_special_file_inside_the_folder_stays(tmp_path, linked):
    """Nothing of the folder is replaced then."""
    os.mkfifo(fifo := tmp_path / "fifo")
    folder = tmp_path / "folder"
    write_into(folder)
    (folder / "a.safetensors").write_text("old")
    (folder / "config.json").unlink()
    if linked:
        (folder / "config.json").symlink_to(fifo)
    else:
        fifo.rename(folder / "config.json")
    with pytest.raises(OSError, match=f"^{folder} cannot be written: .* is neither a regular file"):
        write_into(folder)
    assert (folder / "a.safetensors").read_text() == "old"
    assert stat.S_ISFIFO((folder / "config.json").stat().st_mode)
    assert sorted(os.listdir(folder)) == ["a.safetensors", "config.json"]


def test_plain_files_folders_and_links_to_them_are_replaced(tmp_path):
    (tmp_path / "link").symlink_to("file")
    write_file(tmp_path / "link")
    write_file(tmp_path / "link")
    assert (tmp_path / "file").read_text() == "new" and (tmp_path / "link").is_symlink()
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "empty")
    (tmp_path / "to_folder").symlink_to("empty")
    write_into(tmp_path / "to_folder")
    assert sorted(os.listdir(tmp_path / "empty")) == ["a.safetensors", "config.json"]


@pytest.mark.parametrize("writer", WRITERS)
def test_places_without_a_name(writer):
    with pytest.raises(OSError, match="^'' cannot be written: the name is empty"):
        WRITERS[writer]("")
    with pytest.raises(OSError, match="^/ cannot be written: it is the root folder; name a place"):
        WRITERS[writer]("/")
