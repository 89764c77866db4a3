"""What the tests of training share."""

from pathlib import Path

import pytest

from tests.training.small_run import make_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """A small model and its token set; nothing writes into it."""
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder
