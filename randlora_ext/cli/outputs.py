"""Files and folders that appear under their names when they are complete, or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import CliError, first_line


def check_free(out: Path) -> None:
    """CliError where something is at `out`, or it could not be made."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CliError(f"{out} exists; choose another name or remove it first")
    if not out.absolute().parent.is_dir():
        raise CliError(f"{out.absolute().parent} does not exist")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out`, renamed to it at the end, removed after an error."""
    check_free(out)
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.absolute().parent))
    except OSError as error:
        raise CliError(f"{out.absolute().parent}: {first_line(error)}") from error
    try:
        yield scratch
        mask = os.umask(0)
        os.umask(mask)
        scratch.chmod(0o777 & ~mask)  # mkdtemp makes it private
        check_free(out)
        os.rename(scratch, out)
    except OSError as error:
        raise CliError(f"{out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_new(path: Path) -> None:
    """Refuses what `new_file` would: to be asked before long work."""
    if path.exists():
        raise CliError(f"{path} exists; choose another name or remove it first")
    if not path.absolute().parent.is_dir():
        raise CliError(f"{path.absolute().parent} does not exist")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A name beside `path`, renamed to it at the end. An existing `path` is refused."""
    check_new(path)
    scratch = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield scratch
        os.rename(scratch, path)
    except OSError as error:
        raise CliError(f"{path} cannot be written: {error}") from error
    finally:
        scratch.unlink(missing_ok=True)
