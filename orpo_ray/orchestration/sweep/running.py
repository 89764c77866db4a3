"""The trials that run now, and how a signal stops them with their sweep; on the driver."""

import _thread
import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.tune import Callback

from orpo_ray.orchestration.stopping import kept_handlers, requests
from orpo_ray.runs.files import FINAL, STOP, TRIAL_RECORD, TRIALS
from orpo_ray.storage.folder import Folder

_POLL_S = 0.3
# Ray Tune restores its callbacks from a pickle: what they know of this process stands here.
_running: set[str] = set()


class TrialEnds(Callback):  # type: ignore[misc]  # Ray is not typed
    """Keeps which trials run, and records those that the scheduler ended.

    Args:
        sweep: the directory of the sweep.
    """

    def __init__(self, sweep: Folder) -> None:
        self._sweep = sweep

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Ray Tune when a trial has its actor."""
        _running.add(trial.trial_id)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Ray Tune when a trial ended by itself or by the scheduler."""
        _running.discard(trial.trial_id)
        folder = self._sweep / TRIALS / trial.trial_id
        record = _record(folder)
        if record and not (folder.path / FINAL).is_dir():
            with contextlib.suppress(OSError):
                folder.write_json(TRIAL_RECORD, record | {"stopped_early": True})

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Ray Tune when a trial failed."""
        _running.discard(trial.trial_id)


@contextmanager
def stopping_trials(sweep: Folder) -> Iterator[threading.Event]:
    """Let a signal stop the trials that run, with a checkpoint each, and then Ray Tune's loop.

    Ray Tune then takes them for running, and resumes them when the sweep is. The event that is
    given is set by the signal.

    Args:
        sweep: its directory.
    """
    _running.clear()
    asked, ended = threading.Event(), threading.Event()

    def ask() -> bool:
        asked.set()
        _thread.start_new_thread(_stop, (sweep, ended))
        return True

    name = "TUNE_DISABLE_SIGINT_HANDLER"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with requests(ask), kept_handlers():
            try:
                yield asked
            finally:
                ended.set()
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _stop(sweep: Folder, ended: threading.Event) -> None:
    """Ask every running trial to stop, and interrupt Ray Tune once they have; in a thread."""
    asked: set[str] = set()
    while not ended.wait(_POLL_S):
        waiting = {name for name in _running.copy() if not _is_stopped(sweep / TRIALS / name)}
        for name in waiting - asked:
            folder = sweep / TRIALS / name
            if _record(folder):  # it has begun, so it will see the request
                with contextlib.suppress(OSError):
                    folder.write_text(STOP, "")
                    asked.add(name)
        # Before Ray Tune handles it, the signal would end this process.
        if not waiting and callable(signal.getsignal(signal.SIGUSR1)):
            os.kill(os.getpid(), signal.SIGUSR1)


def _is_stopped(trial: Folder) -> bool:
    record = _record(trial)
    return "stopped" in record or "failure" in record


def _record(trial: Folder) -> dict[str, Any]:
    try:
        return trial.read_json(TRIAL_RECORD)
    except (OSError, ValueError):
        return {}
