"""One driver at a time on a run directory; on the driver."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orpo_ray.config import ConfigError

_LOCK = ".lock"


@contextmanager
def claimed(run_directory: Path) -> Iterator[None]:
    """Hold a run directory; the system lets go of it when this process ends, however it does.

    Raises:
        ConfigError: when another driver has it.
    """
    run_directory.mkdir(parents=True, exist_ok=True)
    with (run_directory / _LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                [
                    f"run_name: {run_directory} is in use by {file.read().strip() or 'another run'}"
                    "; wait for it, or choose another run_name"
                ]
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
