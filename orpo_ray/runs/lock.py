"""One driver at a time on a run directory: a lock on a disk, a renewed lease in a bucket."""

import contextlib
import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from orpo_ray.runs.mirror import in_use, unusable
from orpo_ray.storage.folder import Folder

LEASE = ".lease"
# A lease that was not renewed for this long has expired.
STALE_S = 30.0
_RENEW_S, _LOOK_S = 5.0, 1.0


@contextlib.contextmanager
def leased(run: Folder, driver: str) -> Iterator[None]:
    """Hold a run directory that is a copy of one in a bucket.

    Where the last driver was cut off, this waits until its lease is stale.

    Raises:
        ConfigError: when another driver has it, and when the bucket cannot be used.
    """
    mine = {"driver": driver, "since": time.time(), "machine": _machine(), "pid": os.getpid()}
    mine["id"] = uuid.uuid4().hex
    try:
        _wait_until_free(run)
        run.write_json(LEASE, mine)
        time.sleep(_LOOK_S)
        if read_lease(run) != mine:
            raise in_use(run, _holder(run))
    except OSError as error:
        raise unusable(run, error) from error
    ended = threading.Event()
    thread = threading.Thread(target=_renew, args=(run, mine, ended), name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError):
            run.write_json(LEASE, mine | {"ended": True})


def read_lease(run: Folder) -> dict[str, Any]:
    """The lease of the last driver in the bucket; empty where there was none."""
    return run.read_json(LEASE)


def _wait_until_free(run: Folder) -> None:
    """Wait until the lease is free.

    Raises:
        ConfigError: when it is renewed meanwhile.
    """
    first = read_lease(run)
    if not first or first.get("ended") or _is_gone(first):
        return
    seen = (run.path / LEASE).stat().st_mtime_ns
    while (age := run.age_s(LEASE)) is not None and age < STALE_S:
        if read_lease(run).get("ended"):
            return
        if (run.path / LEASE).stat().st_mtime_ns != seen:
            raise in_use(run, _holder(run))
        time.sleep(_LOOK_S)


def _is_gone(lease: dict[str, Any]) -> bool:
    """Whether the driver was a process of this machine that is no more."""
    if lease.get("machine") != _machine():
        return False
    try:
        os.kill(lease["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _machine() -> str:
    """This machine since it started, or this container on it."""
    return f"{socket.gethostname()} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"


def _holder(run: Folder) -> str:
    return str(read_lease(run).get("driver", "another run"))


def _renew(run: Folder, mine: dict[str, Any], ended: threading.Event) -> None:
    while not ended.wait(_RENEW_S):
        with contextlib.suppress(OSError):
            run.write_json(LEASE, mine)


_LOCK = ".lock"
# Reading the status of a run holds its lock for an instant, for which no driver is refused.
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
def claimed(run: Folder) -> Iterator[None]:
    """Hold a run directory; the system releases the lock when this process ends.

    Raises:
        ConfigError: when another driver has it, and when its bucket cannot be used.
    """
    name = f"process {os.getpid()} on {socket.gethostname()}"
    try:
        lock = (run.make().path / _LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise unusable(run, error) from error
    with lock as file:
        if not _takes(file):
            file.seek(0)
            raise in_use(run, file.read().strip() or "another run")
        file.truncate(0)
        file.write(f"{name}\n")
        file.flush()
        with nullcontext() if run.url is None else leased(run, name):
            yield


def last_driver(run: Folder) -> Driver | None:
    """The driver that claimed a run directory last; None where there was none."""
    if run.url is not None:
        lease = read_lease(run)
        if not lease:
            return None
        age = run.age_s(LEASE)
        return Driver(
            lease["driver"],
            lease["since"],
            not lease.get("ended") and age is not None and age < STALE_S,
        )
    try:
        with (run.path / _LOCK).open(encoding="utf-8") as file:
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
