"""Files of a bucket: its file system, and moving single files from and to a disk."""

import functools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orpo_ray.storage.files import replacing
from orpo_ray.storage.names import refuse_unsafe_name, refuse_unsafe_url

PROTOCOLS = ("s3", "gs")
URLS = tuple(f"{protocol}://" for protocol in PROTOCOLS)
FETCHING = ".fetching"
# Files of a copy that are this node's own.
_OWN = (".tmp", ".lock", FETCHING)
_BLOCK = 8 << 20


def file_system(url: str) -> tuple[Any, str]:
    """The file system of pyarrow that a URL is in, and the path in it.

    Raises:
        OSError: when there is no such bucket, and for a path with `..`, `.` or empty parts.
    """
    refuse_unsafe_url(url)
    protocol, _, rest = url.partition("://")
    bucket, _, inner = rest.partition("/")
    system, name = _file_system(protocol, bucket)
    return system, f"{name}/{inner}".rstrip("/")


@functools.lru_cache(maxsize=16)
def _file_system(protocol: str, bucket: str) -> tuple[Any, str]:
    """Of one bucket, and its name there, which is without `anonymous@`.

    Region, credentials and address come from the environment.

    Raises:
        OSError: when there is no such bucket.
    """
    from pyarrow.fs import FileSystem

    # One request for a file that fits into one part, instead of three.
    options = "?allow_delayed_open=true" if protocol == "s3" else ""
    system, name = FileSystem.from_uri(f"{protocol}://{bucket}{options}")
    return system, name


def upload(path: Path, url: str) -> tuple[int, int]:
    """Store a file; returns the stamp of what was stored, by which a change is known.

    The file gets the time of what is stored, by which it is known to be the same.
    """
    system, key = file_system(url)
    before = stamp(path)
    with path.open("rb") as source, system.open_output_stream(key) as target:
        shutil.copyfileobj(source, target, _BLOCK)
    stored = system.get_file_info(key)
    if stamp(path) != before:
        return before  # it grew meanwhile
    if stored.size != before[0]:
        raise OSError(f"{url} has {stored.size} bytes instead of {before[0]}")
    os.utime(path, ns=(stored.mtime_ns, stored.mtime_ns))
    return stamp(path)


def download(system: Any, info: Any, path: Path) -> None:
    """Fetch a file unless the copy is the same; one that is not there is deleted here."""
    if not info.is_file:
        path.unlink(missing_ok=True)
        return
    if path.exists() and stamp(path) == (info.size, info.mtime_ns):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        with system.open_input_stream(info.path) as source, beside.open("wb") as target:
            shutil.copyfileobj(source, target, _BLOCK)
        os.utime(beside, ns=(info.mtime_ns, info.mtime_ns))


def listed(url: str) -> dict[str, Any]:
    """`FileInfo` of pyarrow for all files below a folder in the bucket, by relative name.

    Raises:
        UnsafeNameError: for an object whose name would lead out of a folder.
    """
    from pyarrow.fs import FileSelector

    system, key = file_system(url)
    infos = system.get_file_info(FileSelector(key, recursive=True, allow_not_found=True))
    found = {info.path.removeprefix(f"{key}/"): info for info in infos if info.is_file}
    for name in found:
        refuse_unsafe_name(name, url)
    return found


def files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder but this node's own."""
    for path in folder.rglob("*"):
        if not path.name.endswith(_OWN) and path.is_file():
            yield path


def stamp(path: Path) -> tuple[int, int]:
    """Bytes of a file and when it was written, by which a change of it is known."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
