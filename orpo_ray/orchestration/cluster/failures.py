"""What ended workers and tasks, where that is known and can be helped; on the driver."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ray.exceptions import ActorDiedError, OutOfMemoryError, RayError
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from orpo_ray.training.errors import TrainingError

_MISSING = re.compile(r"ModuleNotFoundError: No module named '([\w.]+)'")
_NODE = re.compile(r"\bip=([0-9a-fA-F.:]+)")


@contextmanager
def naming_missing_packages() -> Iterator[None]:
    """Turn the failure of a node without a package into one line.

    Raises:
        TrainingError: naming the package and the node.
    """
    try:
        yield
    except (RayError, TrainingFailedError) as error:
        text = missing_package_text(error)
        if text is None:
            raise
        raise TrainingError(text) from error


def missing_package_text(error: BaseException) -> str | None:
    """A line about a node that lacks a package; None for other errors."""
    text = str(error)
    missing = _MISSING.search(text)
    if missing is None:
        return None
    found = _NODE.search(text)
    node = found[1] if found else "of a worker"
    if found is None and isinstance(error, WorkerGroupError):
        node = f"of worker {', '.join(map(str, sorted(error.worker_failures)))}"
    return (
        f"node {node}: no module named {missing[1]!r}: every node "
        "needs the packages of the driver, in its image or by a runtime environment "
        "(ray job submit --runtime-env-json)"
    )


def out_of_memory_text(error: BaseException) -> str | None:
    """A line about workers that were killed, mostly for lack of memory; None for other errors."""
    if not isinstance(error, WorkerGroupError):
        return None
    failures: Mapping[int, BaseException] = error.worker_failures
    monitored = [rank for rank, failure in failures.items() if _is_of_monitor(failure)]
    killed = [
        rank
        for rank, failure in failures.items()
        # Ray's text for a process that is gone; of others it has the cause.
        if isinstance(failure, ActorDiedError) and "OOM killer" in str(failure)
    ]
    if monitored:
        how = "was ended by Ray's memory monitor (RAY_memory_usage_threshold)"
    elif killed:
        how = "was killed or crashed, as at the limit of memory of a container or a machine"
    else:
        return None
    ranks = ", ".join(map(str, sorted(monitored or killed)))
    return (
        f"worker {ranks} {how}: if memory ran out, set a lower max_tokens_per_microbatch, "
        "gradient_checkpointing=true, or fewer workers per node"
    )


def _is_of_monitor(failure: BaseException) -> bool:
    """Whether Ray ended a worker because its node ran low on memory."""
    return isinstance(failure, OutOfMemoryError) or "running low on memory" in str(failure)
