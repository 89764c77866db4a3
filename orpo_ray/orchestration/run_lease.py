"""One driver at a time on a run directory in a bucket: an object that its driver keeps renewing.

On the driver, and in whoever asks about a run. A bucket has no locks. Of two drivers that begin
within the same second on two machines both may go on; later ones are refused.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orpo_ray.orchestration.run_copy import in_use, unusable
from orpo_ray.storage.mirror import age_s, fetch, publish

LEASE = ".lease"
# A lease that was not renewed for so long is nobody's any more.
STALE_S = 30.0
_RENEW_S, _LOOK_S = 5.0, 1.0


@contextlib.contextmanager
def leased(run_directory: Path, driver: str) -> Iterator[None]:
    """Hold a run directory that is a copy of one in a bucket.

    Where the last driver was cut off, this waits until its lease is stale.

    Raises:
        ConfigError: when another driver has it, and when the bucket cannot be used.
    """
    path = run_directory / LEASE
    mine = {"driver": driver, "since": time.time(), "machine": _machine(), "pid": os.getpid()}
    mine["id"] = uuid.uuid4().hex
    try:
        _wait_until_free(path)
        _write(path, mine)
        time.sleep(_LOOK_S)
        if read_lease(path) != mine:
            raise in_use(run_directory, _holder(path))
    except OSError as error:
        raise unusable(run_directory, error) from error
    ended = threading.Event()
    thread = threading.Thread(target=_renew, args=(path, mine, ended), name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError):
            _write(path, mine | {"ended": True})


def read_lease(path: Path) -> dict[str, Any]:
    """What the last driver wrote into the bucket; empty where there was none."""
    fetch(path)
    lease: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return lease


def _wait_until_free(path: Path) -> None:
    """Return once the lease is nobody's.

    Raises:
        ConfigError: when it is renewed meanwhile.
    """
    first = read_lease(path)
    if not first or first.get("ended") or _is_gone(first):
        return
    seen = path.stat().st_mtime_ns
    while (age := age_s(path)) is not None and age < STALE_S:
        if read_lease(path).get("ended"):
            return
        if path.stat().st_mtime_ns != seen:
            raise in_use(path.parent, _holder(path))
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


def _holder(path: Path) -> str:
    return str(read_lease(path).get("driver", "another run"))


def _renew(path: Path, mine: dict[str, Any], ended: threading.Event) -> None:
    while not ended.wait(_RENEW_S):
        with contextlib.suppress(OSError):
            _write(path, mine)


def _write(path: Path, lease: dict[str, Any]) -> None:
    path.write_text(json.dumps(lease))
    publish(path)
