"""Running one function over many small descriptions with Ray Data; on the driver."""

import json
import warnings
from typing import Any

from orpo_ray.preference.errors import DataError

# Of a task whose process ends, as on a node that goes away. By default Ray Data tries without end.
_RETRIES = 3


def map_tasks(items: list[dict[str, Any]], work: Any) -> list[dict[str, Any]]:
    """Apply `work` to every item in a Ray Data task of its own; items and answers are JSON.

    An error of `work` is raised here as it was raised there.

    Args:
        items: small descriptions; those of files have their `path`, or a `split` with it.
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
    try:
        with warnings.catch_warnings():
            # Ray 2.60 has no other place for the number of retries than the one it deprecates.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            tasks = dataset.flat_map(work, max_retries=_RETRIES)
        with naming_missing_packages():
            answers = tasks.take_all()
    except _ended_process():
        answers = _one_by_one(rows, work)
    return [json.loads(answer["item"]) for answer in answers]


def _one_by_one(rows: list[dict[str, str]], work: Any) -> list[dict[str, str]]:
    """Apply `work` to each row in a task that is not retried, to find out which rows fail.

    Raises:
        DataError: naming their files.
    """
    import ray

    task = ray.remote(max_retries=0)(lambda row: work(row))
    started = [(row, task.remote(row)) for row in rows]
    answers, problems = [], []
    for row, answer in started:
        try:
            answers += ray.get(answer)
        except _ended_process():
            problems.append(
                f"{_file_of(json.loads(row['item']))}: the process that reads it ended without an "
                f"error, {_RETRIES + 2} times; the file is damaged, its rows take more memory than "
                "there is, or the chat template has no end"
            )
    if problems:
        raise DataError(sorted(set(problems)))
    return answers


def _ended_process() -> tuple[type[Exception], ...]:
    from ray.exceptions import OutOfMemoryError, WorkerCrashedError

    return WorkerCrashedError, OutOfMemoryError


def _file_of(item: dict[str, Any]) -> str:
    return str(item.get("path") or item.get("split", {}).get("path") or "a part of the token set")
