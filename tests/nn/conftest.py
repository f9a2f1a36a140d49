"""Fixtures of several files in this folder."""

import pytest


@pytest.fixture
def folder(tmp_path):
    """Of a saved adapter; does not exist yet."""
    return tmp_path / "adapter"
