"""What is said of workers that were killed."""

import os
import signal

import pytest
import ray
from ray.exceptions import OutOfMemoryError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from orpo_ray.orchestration.cluster.failures import (
    missing_package_text,
    naming_missing_packages,
    out_of_memory_text,
)
from orpo_ray.training.errors import TrainingError


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


class Unloadable:
    """What a node without the package of its class receives."""

    def __reduce__(self):
        return __import__, ("package_of_the_driver",)


def test_a_node_without_a_package_is_named(ray_cluster):
    """An argument, a function, and Ray Train's controller fail in ways of their own."""
    argument = ray.remote(lambda value: value).remote(Unloadable())
    inside = ray.remote(lambda: __import__("package_of_the_driver")).remote()
    address = ray.get_runtime_context().gcs_address.rpartition(":")[0]
    for reference in (argument, inside):
        with pytest.raises(TrainingError) as named, naming_missing_packages():
            ray.get(reference)
        line = str(named.value)
        assert line.startswith(f"node {address}: no module named 'package_of_the_driver': ")
        assert "\n" not in line
    assert missing_package_text(ControllerError(named.value.__cause__)) == line
    trace = "[Rank 1]:\nTraceback\nModuleNotFoundError: No module named 'peft'"
    told = missing_package_text(WorkerGroupError(trace, {1: ModuleNotFoundError("peft")}))
    assert told.startswith("node of worker 1: no module named 'peft': ")


def test_other_errors_stay_what_they_are(ray_cluster):
    with pytest.raises(ray.exceptions.RayTaskError), naming_missing_packages():
        ray.get(ray.remote(lambda: 1 / 0).remote())
