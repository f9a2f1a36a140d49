"""Files that other processes read and write, too: complete when they appear, and read at once.

Everything is written into a scratch folder beside its place and then renamed, so a process that is
killed leaves the old file or the new one. If the place is a symbolic link, the link stays and what
it leads to is written. Scratch folders of killed processes are removed by the next write.
"""

import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

SCRATCH = ".randlora-writing-"
_FAILED = " cannot be written: "
# The writer of torch.save, in C++, has no class of errors.
_OF_TORCH = "PytorchStreamWriter", "inline_container.cc", "iostream error"


@contextmanager
def appear(file: str | os.PathLike) -> Iterator[Path]:
    """A scratch path, renamed to `file` when the block ends. Its folder must exist.

    `file` may be a folder, which then must be empty or missing. If the block raises, nothing has
    changed. OSError, ``FILE cannot be written: REASON``, if that is the reason: also if something
    else is there, such as a FIFO or a device, which a rename would replace.
    """
    place = _resolved(file)
    with _scratch_in(place.parent, file) as scratch:
        yield scratch / place.name
        _refuse_special(place)
        os.replace(scratch / place.name, place)


@contextmanager
def appear_together(folder: str | os.PathLike) -> Iterator[Path]:
    """A scratch folder inside `folder`; its files are renamed into it when the block ends.

    `folder` is made if it is missing. Configurations come last, since loading starts with them.
    Errors are those of `appear`.
    """
    place = _resolved(folder)
    with _scratch_in(place, folder, make=True) as scratch:
        yield scratch
        files = [path for path in scratch.rglob("*") if path.is_file()]
        files.sort(key=lambda path: (path.suffix == ".json", path))
        places = {}
        for path in files:
            at = Path(os.path.realpath(place / path.relative_to(scratch)))  # may be a link, too
            _refuse_special(at)
            places[path] = at
        for path, at in places.items():
            at.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, at)


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file that another process may replace meanwhile.

    It is opened once; safetensors' own readers open it twice, for the header and for the tensors.
    OSError if it cannot be read, ValueError if it is damaged.
    """
    data = Path(path).read_bytes()
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch lacks
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return tensors, header.get("__metadata__") or {}


def _resolved(path: str | os.PathLike) -> Path:
    if not os.fspath(path):
        raise OSError(f"''{_FAILED}the name is empty")
    place = Path(os.path.realpath(path))
    if not place.name:
        raise OSError(f"{os.fspath(path)}{_FAILED}it is the root folder; name a place below it")
    return place


def _refuse_special(place: Path) -> None:
    """OSError unless there is a regular file, a folder or nothing; `place` is no link."""
    if place.exists() and not (place.is_file() or place.is_dir()):
        raise OSError(f"{place} is neither a regular file nor a folder")


@contextmanager
def _scratch_in(folder: Path, path: str | os.PathLike, make: bool = False) -> Iterator[Path]:
    try:
        _refuse_special(Path(os.path.realpath(path)))
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder), tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder) as scratch:
            yield Path(scratch)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = (str(error) or repr(error)).splitlines()[0].rpartition(_FAILED)[2]
        if isinstance(error, RuntimeError):
            if not any(name in str(error) for name in _OF_TORCH):
                raise
            reason = "torch.save could not write all of it, as on a full disk"
        reason = re.sub(rf"[^\s'\"]*{re.escape(SCRATCH)}[^\s'\"/]*/?", "", reason)
        raise OSError(f"{os.fspath(path)}{_FAILED}{reason}") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Scratch folders in a folder that no process has locked are left-overs: the kernel releases a
    process's lock when it dies."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)  # a FIFO would make it wait
    try:
        with suppress(OSError):  # another process is writing, or the file system has no locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left_over in folder.glob(f"{SCRATCH}*"):
                shutil.rmtree(left_over, ignore_errors=True)
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_SH)
        yield
    finally:
        os.close(lock)
