"""What the tests of training share."""

from pathlib import Path

import pytest

from tests.distributed import run_ranks
from tests.training.small_run import make_inputs, train_small


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """A small model and its token set; nothing writes into it."""
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.fixture(scope="session")
def whole_run(inputs: Path, tmp_path_factory) -> Path:
    """24 steps on two ranks, never interrupted; nothing writes into it."""
    run = tmp_path_factory.mktemp("whole") / "run"
    run_ranks(2, train_small, inputs, run, {})
    return run
