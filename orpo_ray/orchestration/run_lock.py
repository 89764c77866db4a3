"""One driver at a time on a run directory; on the driver, and in whoever asks about a run."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from orpo_ray.orchestration.run_copy import in_use
from orpo_ray.orchestration.run_lease import LEASE, STALE_S, leased, read_lease
from orpo_ray.storage.bucket import is_copy, make_folder
from orpo_ray.storage.mirror import age_s

_LOCK = ".lock"
# Whoever asks about a run holds its lock for an instant, for which no driver is refused.
_TRIES, _PAUSE_S = 5, 0.1


@dataclass(frozen=True)
class Driver:
    """The driver that claimed a run directory last.

    Args:
        name: its process and machine.
        since: when it claimed the directory, in seconds since 1970.
        is_alive: whether it has the directory now; None where this machine cannot tell, since
            the lock is free here and the driver was on another one.
    """

    name: str
    since: float
    is_alive: bool | None


@contextmanager
def claimed(run_directory: Path) -> Iterator[None]:
    """Hold a run directory; the system lets go of it when this process ends, however it does.

    Raises:
        ConfigError: when another driver has it, and when its bucket cannot be used.
    """
    make_folder(run_directory)
    name = f"process {os.getpid()} on {socket.gethostname()}"
    with (run_directory / _LOCK).open("a+") as file:
        if not _takes(file):
            file.seek(0)
            raise in_use(run_directory, file.read().strip() or "another run")
        file.truncate(0)
        file.write(f"{name}\n")
        file.flush()
        with leased(run_directory, name) if is_copy(run_directory) else nullcontext():
            yield


def last_driver(run_directory: Path) -> Driver | None:
    """Who claimed a run directory last, and whether that driver still has it; None for nobody."""
    if is_copy(run_directory):
        lease = read_lease(run_directory / LEASE)
        if not lease:
            return None
        age = age_s(run_directory / LEASE)
        return Driver(
            lease["driver"],
            lease["since"],
            not lease.get("ended") and age is not None and age < STALE_S,
        )
    try:
        with (run_directory / _LOCK).open() as file:
            name, since = file.read().strip(), os.fstat(file.fileno()).st_mtime
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return Driver(name, since, True)
    except FileNotFoundError:
        return None
    is_here = name.endswith(f" on {socket.gethostname()}")
    return Driver(name, since, False if is_here else None)


def _takes(file: IO[str]) -> bool:
    """Whether the lock is ours, perhaps after a moment."""
    for _ in range(_TRIES):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_PAUSE_S)
        else:
            return True
    return False
