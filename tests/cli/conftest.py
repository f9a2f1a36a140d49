"""A model folder and an adapter that several tests of the command line read."""

import shutil

import pytest
from cli_helpers import save_adapter, sharded


@pytest.fixture(scope="session")
def sound(tmp_path_factory):
    """A folder with a model of several files and an adapter; no test changes it."""
    root = tmp_path_factory.mktemp("sound")
    save_adapter(sharded(root / "model"), root / "adapter", basis="independent")
    return root


@pytest.fixture
def whole(sound, tmp_path):
    """A copy of `sound` for a test to change."""
    return shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
