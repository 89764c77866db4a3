"""Stopping a run when its driver is told to end: the workers save first; on the driver."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orpo_ray.runs.files import STOP
from orpo_ray.storage.mirror import remove

STOPPED = 128 + signal.SIGTERM  # the exit code of a process that ended on this signal


@contextmanager
def stopping_on_sigterm(run_directory: Path) -> Iterator[None]:
    """Let SIGTERM (of `ray job stop`, of a pod that ends) ask the workers to save and to stop.

    Outside the main thread signals cannot be handled, and nothing is done.

    Args:
        run_directory: where the workers look for the request.
    """
    request = run_directory / STOP
    remove(request)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: request.touch())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        remove(request)
