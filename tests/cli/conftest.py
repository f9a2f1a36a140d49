"""A model folder that several tests of the command line read."""

import pytest


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    from cli_helpers import llama

    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    return folder
