"""What runs leave behind and need no longer: listed, and deleted when old; on the driver."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

from orpo_ray.storage.bucket import PROTOCOLS, listed
from orpo_ray.storage.folder import Folder
from orpo_ray.storage.scratch import has_copies

# A hash, as ingest names a token set.
_TOKEN_SET = re.compile(r"[0-9a-f]{32}(?=/)")
# Data sets of the hub or of memory, named by their content or `datasets`' hash.
_INPUT = re.compile(r"inputs/(?:[0-9a-f]{16}|[0-9a-f]{32})\.parquet$")
_SET_ASIDE = re.compile(r"(?:[^/]+/)+checkpoints/set-aside(?=/)")
_COPY = re.compile(rf"[^/]+/(?:{'|'.join(PROTOCOLS)})/[^/]+(?=/)")
_UNITS_S = {"d": 86400.0, "h": 3600.0, "m": 60.0}


@dataclass(frozen=True)
class Leftover:
    """A folder or a file that a run made, and that no run needs or the next one makes again.

    Args:
        folder: that it is in.
        name: in that folder.
        kind: what it is.
        size_bytes: of its files.
        age_s: seconds since a file of it was written here.
    """

    folder: Folder
    name: str
    kind: str
    size_bytes: int
    age_s: float


def leftovers(output: Folder, cache: Folder, copies: Folder) -> list[Leftover]:
    """What runs left behind, the oldest first of each kind; nothing with a name of others.

    Args:
        output: the output directory, with copied inputs, and checkpoints that were set aside.
        cache: the token sets, whether or not their ingest came to its end.
        copies: of buckets; listed by side and bucket.

    Raises:
        OSError: when a bucket cannot be read.
    """
    found = _found(cache, _TOKEN_SET, "token set")
    found += _found(output, _INPUT, "copied input")
    found += _found(output, _SET_ASIDE, "damaged checkpoint")
    if has_copies(copies.path):
        found += _found(copies, _COPY, "copy of a bucket")
    return found


def clear(found: list[Leftover], older_than_s: float) -> list[Leftover]:
    """Delete what is as old; returns it."""
    old = [one for one in found if one.age_s >= older_than_s]
    for one in old:
        one.folder.remove(one.name)
    return old


def age_in_seconds(text: str) -> float:
    """The seconds of `30d`, `12h` or `45m`.

    Raises:
        ValueError: for anything else.
    """
    found = re.fullmatch(r"(\d{1,6})([dhm])", text)
    if found is None:
        raise ValueError(f"{text!r} is no age: give days, hours or minutes, as in 30d, 12h or 45m")
    return int(found[1]) * _UNITS_S[found[2]]


def _found(folder: Folder, pattern: re.Pattern[str], kind: str) -> list[Leftover]:
    """What is named by the beginning of a file's name, the oldest first."""
    sizes: dict[str, int] = {}
    times: dict[str, float] = {}
    for name, size, written in _files(folder):
        match = pattern.match(name)
        if match:
            sizes[match[0]] = sizes.get(match[0], 0) + size
            times[match[0]] = max(times.get(match[0], 0.0), written)
    now = time.time()
    found = [Leftover(folder, name, kind, sizes[name], now - times[name]) for name in sizes]
    return sorted(found, key=lambda one: -one.age_s)


def _files(folder: Folder) -> Iterator[tuple[str, int, float]]:
    """Name, bytes and time of every file below a folder, where it is stored.

    A copy has the time of what it is a copy of: when its metadata changed is when it was made.
    """
    if folder.url is not None:
        for name, info in listed(folder.url).items():
            yield name, info.size, info.mtime_ns / 1e9
        return
    for path in folder.path.rglob("*"):
        if path.is_file() and not path.is_symlink():
            stat = path.stat()
            written = (
                max(stat.st_mtime, stat.st_ctime) if has_copies(folder.path) else stat.st_mtime
            )
            yield path.relative_to(folder.path).as_posix(), stat.st_size, written
