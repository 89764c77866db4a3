"""What ended workers, where that is known and can be helped; on the driver."""

from collections.abc import Mapping

from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train.v2.api.exceptions import WorkerGroupError


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
