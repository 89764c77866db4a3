"""The copy of a run or a sweep in a bucket; does nothing for one on a disk; on the driver."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath

from orpo_ray.config.schema import ConfigError
from orpo_ray.runs.files import FINAL, RECORD, TRIAL_RECORD, TRIALS, WRITTEN_BY_WORKERS
from orpo_ray.runs.manifest import FOLDER
from orpo_ray.storage.files import one_line
from orpo_ray.storage.folder import Folder, light

# Of Ray Tune: its own state of a sweep, which it keeps in the bucket by itself.
TUNE_STATE = "ray_tune"
# Folders whose writers publish what they write, and where the driver does so file by file.
_OF_OTHERS = (FOLDER, FINAL, TRIALS, TUNE_STATE)
_FROM_WORKERS = frozenset({*WRITTEN_BY_WORKERS, TRIAL_RECORD, f"{FINAL}/{RECORD}"})


@contextmanager
def working_on(run: Folder) -> Iterator[None]:
    """Fetch a run from its bucket, and keep the local copy synchronized inside the context.

    Raises:
        ConfigError: when the bucket cannot be read.
    """
    refresh(run)
    with run.kept_in_step(_by_driver, from_workers):
        yield
    run.forget_heavy()


def refresh(run: Folder) -> None:
    """Update a local copy from its bucket, except for weights.

    Raises:
        ConfigError: when the bucket cannot be read.
    """
    try:
        run.fetch(_of_interest)
    except OSError as error:
        raise unusable(run, error) from error


def unusable(run: Folder, error: OSError) -> ConfigError:
    """The error for a bucket that cannot be used."""
    return ConfigError([f"output_dir: {run.parent} cannot be used: {one_line(error)}"])


def in_use(run: Folder, driver: str) -> ConfigError:
    """The error for a run directory that another driver holds."""
    return ConfigError(
        [f"run_name: {run.address} is in use by {driver}; wait for it, or choose another run_name"]
    )


def from_workers(name: str) -> bool:
    """Whether workers or trials write this file of a run or a sweep."""
    parts = PurePosixPath(name).parts
    inner = parts[2:] if parts[0] == TRIALS else parts
    return "/".join(inner) in _FROM_WORKERS


def _by_driver(name: str) -> bool:
    first = PurePosixPath(name).parts[0]
    return first not in _OF_OTHERS and not first.startswith(".") and not from_workers(name)


def _of_interest(name: str) -> bool:
    return light(name) and PurePosixPath(name).parts[0] != TUNE_STATE
