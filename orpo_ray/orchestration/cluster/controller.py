"""Ray Train's controller: replaced when it dies, and ended by a signal; on the driver."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray import PlacementGroupID
from ray.exceptions import RayActorError, RayError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
from ray.util.placement_group import (
    PlacementGroup,
    placement_group_table,
    remove_placement_group,
)

from orpo_ray.storage.files import first_line
from orpo_ray.training.errors import TrainingError

_ABORT_S = 3.0
_ADDRESS = "RAY_ADDRESS"
_log = logging.getLogger(__name__)


class Trainer(TorchTrainer):  # type: ignore[misc]  # Ray is not typed
    """A trainer that leaves SIGINT to those who handle it, and can end what it started."""

    _controller: Any = None

    def _register_sigint_handler(self, controller: Any) -> None:
        """Keep the controller, in place of Ray Train's handler, after which Ctrl-C exits with 0."""
        self._controller = controller

    def abort(self) -> None:
        """End the workers at once."""
        if self._controller is None:
            return
        with contextlib.suppress(RayError, ValueError):
            ray.get(self._controller.abort.remote(), timeout=_ABORT_S)
        with contextlib.suppress(RayError, ValueError):
            ray.kill(self._controller)


def fit(make: Callable[[], Trainer], max_failures: int, stops: Callable[[], bool]) -> Any:
    """Train; returns what rank 0 returned.

    Ray Train restarts workers, but nobody restarts its controller: where that dies, another one
    begins at the newest checkpoint.

    Args:
        make: a new trainer.
        max_failures: number of controllers that may die; -1 for no limit.
        stops: whether the run is to end, so that there is no other controller.

    Raises:
        KeyboardInterrupt: when a signal ends the workers at once.
        TrainingError: when controllers keep dying.
        ray.train.TrainingFailedError: when workers keep failing.
    """
    others, n_deaths = set(placement_group_table()), 0
    while True:
        trainer = make()
        try:
            with _own_address():
                return trainer.fit().return_value
        except KeyboardInterrupt:
            trainer.abort()
            _remove_placement_groups(others)
            raise
        except RayActorError as error:  # of workers it is a TrainingFailedError
            if stops():
                raise
            n_deaths += 1
            reason = f"Ray Train's controller died: {first_line(error).rstrip('.')}"
            if 0 <= max_failures < n_deaths:
                goes_on = "the same command with the same run_name goes on"
                raise TrainingError(f"{reason}; {goes_on}") from error
            _log.warning("%s; another one begins at the newest checkpoint", reason)
            _remove_placement_groups(others)


@contextlib.contextmanager
def _own_address() -> Iterator[None]:
    """Name this Ray to the actors that Ray Train starts.

    The one that frees the workers of a stopped trial looks for its cluster as a command would: it
    found the last `ray start` of this machine, dead or alive, and the sweep waited for ever.
    """
    before = os.environ.get(_ADDRESS)
    os.environ[_ADDRESS] = ray.get_runtime_context().gcs_address
    ENV_VARS_TO_PROPAGATE.add(_ADDRESS)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_ADDRESS, None)
        else:
            os.environ[_ADDRESS] = before


def _remove_placement_groups(others: set[str]) -> None:
    """Free what the workers of a dead controller hold, which ends them as well.

    Ray Train does so where Ray has a dashboard to ask, so in every sweep: there, groups of other
    trials are of the same job.

    Args:
        others: ids of those that were there before.
    """
    context = ray.get_runtime_context()
    if context.get_actor_id() is not None:
        return
    for name, group in placement_group_table().items():
        # The id of a placement group ends with that of its job.
        ours = name not in others and name.endswith(context.get_job_id())
        if ours and group["state"] != "REMOVED":
            with contextlib.suppress(RayError):
                remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))
