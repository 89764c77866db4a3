"""Running one function over many small descriptions with Ray Data; on the driver."""

import json
import logging
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from orpo_ray.preference.errors import DataError
from orpo_ray.runs.formatting import format_duration

_log = logging.getLogger(__name__)
# Of a task whose process ends, as on a node that goes away. By default Ray Data tries without end.
_RETRIES = 3


def map_tasks(items: list[dict[str, Any]], work: Any) -> list[dict[str, Any]]:
    """Apply `work` to every item in a Ray Data task of its own; items and answers are JSON.

    An error of `work` is raised here as it was raised there. How far it is, is logged every
    few seconds.

    Args:
        items: small descriptions; those of files have their `path`, a `split` with it, or `files`.
        work: takes `{"item": JSON}` and gives a list of such.

    Raises:
        DataError: naming the files whose task ends its process each time it is tried.
        TrainingError: for a node that lacks a package.
    """
    import ray.data
    from ray.util.annotations import RayDeprecationWarning

    from orpo_ray.orchestration.cluster.failures import naming_missing_packages

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    rows = [{"item": json.dumps(item)} for item in items]
    dataset = ray.data.from_items(rows, override_num_blocks=max(1, len(rows)))
    answers: list[dict[str, Any]] = []
    try:
        with warnings.catch_warnings():
            # Ray 2.60 has no other place for the number of retries than the one it deprecates.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            tasks = dataset.flat_map(_Marked(work), max_retries=_RETRIES)
        with naming_missing_packages(), Progress(len(items)) as progress:
            for row in tasks.iter_rows():
                answers += [json.loads(row["item"])] if row["item"] else []
                progress.add(answers[-1] if row["item"] else {}, row["is_last"])
    except _ended_process():
        answers = [json.loads(answer["item"]) for answer in _one_by_one(rows, work)]
    return answers


@dataclass(frozen=True)
class _Marked:
    """A data task whose last answer to an item is marked as such."""

    work: Callable[[dict[str, str]], list[dict[str, str]]]

    def __call__(self, row: dict[str, str]) -> list[dict[str, Any]]:
        answers = self.work(row) or [{"item": ""}]
        last = len(answers) - 1
        return [answer | {"is_last": i == last} for i, answer in enumerate(answers)]


class Progress:
    """Logs how many rows have been read, at which rate, and the time left, until the end.

    Args:
        n_items: items to be done; they are taken to be of about the same size.
        every_s: seconds between two lines.
    """

    def __init__(self, n_items: int, every_s: float = 10.0) -> None:
        self._n_items, self._every_s = n_items, every_s
        self._n_done = self._n_rows = 0
        self._started = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="orpo-ingest", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def add(self, answer: Mapping[str, Any], is_last: bool) -> None:
        """Count an answer, and its item if it is the last one to that."""
        self._n_rows += answer.get("rows_read", 0)
        self._n_done += is_last

    def text(self, passed_s: float) -> str:
        """How far it is after some seconds."""
        rate = f", {self._n_rows / passed_s:,.0f} rows/s" if self._n_rows else ""
        text = f"reading the data: {self._n_rows:,} rows{rate}"
        if not self._n_rows:
            text = f"reading the data: part {self._n_done:,} of {self._n_items:,}"
        if not self._n_done:
            return text
        left_s = passed_s / self._n_done * (self._n_items - self._n_done)
        return f"{text}, about {format_duration(left_s)} left"

    def _repeat(self) -> None:
        while not self._ended.wait(self._every_s):
            _log.info(self.text(time.monotonic() - self._started))


def _one_by_one(rows: list[dict[str, str]], work: Any) -> list[dict[str, str]]:
    """Apply `work` to each row in a task that is not retried, to find out which rows fail.

    Raises:
        DataError: naming their files.
    """
    answers, failed = _each_alone(rows, work)
    items = [json.loads(row["item"]) for row in failed]
    alone = [{"files": [file]} for item in items for file in item.get("files", ())]
    failed_items = [item for item in items if "files" not in item]
    if alone:
        more, failed = _each_alone([{"item": json.dumps(item)} for item in alone], work)
        answers += more
        failed_items += [json.loads(row["item"]) for row in failed]
    if failed_items:
        problems = [
            f"{_file_of(item)}: the process that reads it ended without an error, {_RETRIES + 2} "
            "times; the file is damaged, its rows take more memory than there is, or the chat "
            "template has no end"
            for item in failed_items
        ]
        raise DataError(sorted(set(problems)))
    return answers


def _each_alone(
    rows: list[dict[str, str]], work: Any
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The answers to all rows, and the rows whose task ended its process."""
    import ray

    task = ray.remote(max_retries=0)(lambda row: work(row))
    started = [(row, task.remote(row)) for row in rows]
    answers, failed = [], []
    for row, answer in started:
        try:
            answers += ray.get(answer)
        except _ended_process():
            failed.append(row)
    return answers, failed


def _ended_process() -> tuple[type[Exception], ...]:
    from ray.exceptions import OutOfMemoryError, WorkerCrashedError

    return WorkerCrashedError, OutOfMemoryError


def _file_of(item: dict[str, Any]) -> str:
    if "files" in item:
        return str(item["files"][0][1])
    return str(item.get("path") or item.get("split", {}).get("path") or "a part of the token set")
