"""Commands that tokenize the same file at once."""

import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from orpo_ray.dataset.ingest import ingest
from orpo_ray.dataset.shards import TokenSet
from tests.reference.ingest import map_tasks, request_of, text_row, write_rows

_WAIT_S = 60.0


@pytest.fixture
def request_for(tokenizer_folder, tmp_path):
    file = write_rows(tmp_path / "pairs.jsonl", [text_row(i) for i in range(7)])

    def request(folder: Path):
        return request_of((file,), tokenizer_folder, folder, drop_duplicates=True)

    return request


class Seen(logging.Handler):
    """Sets an event when something is logged."""

    def __init__(self, event: Event) -> None:
        super().__init__(logging.INFO)
        self._event = event

    def emit(self, record: logging.LogRecord) -> None:
        """Called with what is logged."""
        self._event.set()


def test_one_builds_and_the_other_waits_for_it(request_for, tmp_path, monkeypatch):
    """The first goes on once the second has said that it waits."""
    builds, waits = Event(), Event()
    logger = logging.getLogger("orpo_ray.dataset.ingest")
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.addHandler(Seen(waits))

    def first(items, work):
        builds.set()
        assert waits.wait(_WAIT_S)
        return map_tasks(items, work)

    def second(items, work):
        raise AssertionError("it builds as well")

    try:
        with ThreadPoolExecutor(2) as threads:
            one = threads.submit(ingest, request_for(tmp_path), first)
            assert builds.wait(_WAIT_S)
            other = threads.submit(ingest, request_for(tmp_path), second)
    finally:
        logger.removeHandler(logger.handlers[-1])
    assert one.result() == other.result()
    assert one.result().n_pairs == 7


def test_a_set_that_another_machine_has_finished_meanwhile_is_taken(request_for, tmp_path):
    """There the lock says nothing; what the tasks read is removed by whoever is done first."""
    elsewhere = ingest(request_for(tmp_path / "elsewhere"), map_tasks).folder
    here = tmp_path / "cache" / elsewhere.name

    def overtaken(items, work):
        shutil.copytree(elsewhere, here, dirs_exist_ok=True)
        raise FileNotFoundError("a shard that was replaced")

    tokens = ingest(request_for(tmp_path), overtaken)
    assert tokens == TokenSet.load(here)
    assert tokens.n_pairs == 7


def test_an_error_of_its_own_is_raised(request_for, tmp_path):
    def broken(items, work):
        raise FileNotFoundError("gone")

    with pytest.raises(FileNotFoundError, match="gone"):
        ingest(request_for(tmp_path), broken)
