"""The token cache: what is in it, and deleting what is old; on the driver."""

import re
import time
from dataclasses import dataclass

from orpo_ray.storage.bucket import listed
from orpo_ray.storage.folder import Folder

_NAME = re.compile(r"[0-9a-f]{32}")  # a hash, as ingest names a token set
_UNITS_S = {"d": 86400.0, "h": 3600.0, "m": 60.0}


@dataclass(frozen=True)
class CachedSet:
    """A token set in the cache, whether or not its ingest came to its end.

    Args:
        name: of its folder.
        size_bytes: of its files.
        age_s: seconds since a file of it was written.
    """

    name: str
    size_bytes: int
    age_s: float


def cached_sets(cache: Folder) -> list[CachedSet]:
    """The token sets in a cache, the oldest first; folders with other names are not listed.

    Raises:
        OSError: when a bucket cannot be read.
    """
    sizes: dict[str, int] = {}
    times: dict[str, float] = {}
    for name, size, written in _files(cache):
        token_set = name.partition("/")[0]
        if _NAME.fullmatch(token_set):
            sizes[token_set] = sizes.get(token_set, 0) + size
            times[token_set] = max(times.get(token_set, 0.0), written)
    found = [CachedSet(name, size, time.time() - times[name]) for name, size in sizes.items()]
    return sorted(found, key=lambda token_set: -token_set.age_s)


def clear_cache(cache: Folder, older_than_s: float) -> list[CachedSet]:
    """Delete the token sets that are as old; returns them. A run that needs one makes it again."""
    old = [found for found in cached_sets(cache) if found.age_s >= older_than_s]
    for found in old:
        cache.remove(found.name)
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


def _files(cache: Folder) -> list[tuple[str, int, float]]:
    """Name, bytes and time of every file below a folder, where it is stored."""
    if cache.url is not None:
        return [(name, i.size, i.mtime_ns / 1e9) for name, i in listed(cache.url).items()]
    paths = [path for path in cache.path.rglob("*") if path.is_file() and not path.is_symlink()]
    stats = [(path, path.stat()) for path in paths]
    return [(p.relative_to(cache.path).as_posix(), s.st_size, s.st_mtime) for p, s in stats]
