"""What is said of workers that were killed."""

import os
import signal

import pytest
import ray
from ray.exceptions import OutOfMemoryError
from ray.train.v2.api.exceptions import WorkerGroupError

from orpo_ray.orchestration.cluster.failures import out_of_memory_text


@ray.remote(num_cpus=0)
class Killed:
    """Ends as a container's limit of memory ends a process."""

    def end(self) -> None:
        """End this process."""
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_the_system_killed_is_named_with_what_to_set(ray_cluster):
    with pytest.raises(ray.exceptions.RayActorError) as died:
        ray.get(Killed.remote().end.remote())
    told = out_of_memory_text(WorkerGroupError("failed", {1: died.value}))
    assert told.startswith("worker 1 was killed or crashed, as at the limit of memory")
    assert "set a lower max_tokens_per_microbatch, gradient_checkpointing=true" in told


def test_a_worker_that_rays_monitor_ended_is_named():
    failures = {2: OutOfMemoryError("the node is running low on memory"), 0: ValueError("other")}
    told = out_of_memory_text(WorkerGroupError("failed", failures))
    assert told.startswith("worker 2 was ended by Ray's memory monitor")


@pytest.mark.parametrize(
    "error", [WorkerGroupError("failed", {0: ValueError("no memory")}), RuntimeError("SIGKILL")]
)
def test_nothing_is_said_of_other_ends(error):
    assert out_of_memory_text(error) is None
