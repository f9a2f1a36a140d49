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
    changed. OSError, ``FILE cannot be written: REASON``, if that is the reason.
    """
    place = _resolved(file)
    with _scratch_in(place.parent, file) as scratch:
        yield scratch / place.name
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
        for path in sorted(files, key=lambda path: (path.suffix == ".json", path)):
            at = Path(os.path.realpath(place / path.relative_to(scratch)))  # may be a link, too
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
    place = Path(os.path.realpath(path))
    if not os.fspath(path) or not place.name:
        raise OSError(f"{os.fspath(path) or repr('')}{_FAILED}the name is empty")
    return place


@contextmanager
def _scratch_in(folder: Path, path: str | os.PathLike, make: bool = False) -> Iterator[Path]:
    try:
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
    lock = os.open(folder, os.O_RDONLY)
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
