"""Places in a bucket, the paths of their copies on a node's disk, and moving single files.

`s3://bucket/runs` is worked on at `<scratch>/orpo_ray-copies/driver/s3/bucket/runs`. <scratch> is
ORPO_RAY_SCRATCH, else a folder of the user in the system's temporary one: the driver decides, and
the path is the same on every node. Driver and workers have a copy each, also on one node, so that
it makes no difference on which node a worker is.
"""

import functools
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orpo_ray.storage.files import replacing

PROTOCOLS = ("s3", "gs")
URLS = tuple(f"{protocol}://" for protocol in PROTOCOLS)
DRIVER, WORKERS, VIEWS = "driver", "workers", "views"
_COPIES = "orpo_ray-copies"
# Files of a copy that are this node's own.
FETCHING = ".fetching"
_OWN = (".tmp", ".lock", FETCHING)
_BLOCK = 8 << 20
_UPLOADING: dict[Path, threading.Lock] = {}


def local(place: str | Path, side: str = DRIVER) -> Path:
    """The absolute path at which a folder or file is worked on: its own, or that of its copy."""
    protocol, separator, rest = str(place).partition("://")
    if not separator:
        return Path(place).expanduser().resolve()
    default = Path(tempfile.gettempdir(), f"orpo_ray-{os.getuid()}")
    scratch = Path(os.environ.get("ORPO_RAY_SCRATCH") or default).expanduser().resolve()
    return scratch / _COPIES / side / protocol / rest.strip("/")


def make_folder(path: Path) -> None:
    """Make a folder; that of all copies is for this user alone.

    Raises:
        PermissionError: when the folder of all copies is another user's.
    """
    if is_copy(path):
        root = Path(*path.parts[: path.parts.index(_COPIES) + 1])
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if root.stat().st_uid != os.getuid():
            raise PermissionError(f"{root} is another user's; set ORPO_RAY_SCRATCH")
    path.mkdir(parents=True, exist_ok=True)


def address(path: str | Path) -> str:
    """What a path stands for: the URL that it is a copy of, else itself."""
    parts = _parts(path)
    return f"{parts[1]}://{parts[2]}" if parts else str(path)


def of_side(path: Path, side: str) -> Path:
    """The same place as it is worked on by others."""
    if not is_copy(path):
        return path
    at = path.parts.index(_COPIES) + 1
    return Path(*path.parts[:at], side, *path.parts[at + 1 :])


def is_copy(path: str | Path) -> bool:
    """Whether a path is a copy of something in a bucket."""
    return _parts(path) is not None


def upload(path: Path) -> tuple[int, int]:
    """Publish a file; returns the stamp of what was published, by which a change is known.

    The copy gets the time of what is stored, by which it is known to be the same.
    """
    system, key = remote(path)
    # Else the older one of two uploads of a file that grows might be the one that stays.
    with _UPLOADING.setdefault(path, threading.Lock()):
        return _upload(system, key, path)


def _upload(system: Any, key: str, path: Path) -> tuple[int, int]:
    before = stamp(path)
    with path.open("rb") as source, system.open_output_stream(key) as target:
        shutil.copyfileobj(source, target, _BLOCK)
    stored = system.get_file_info(key)
    if stamp(path) != before:
        return before  # it grew meanwhile
    if stored.size != before[0]:
        raise OSError(f"{address(path)} has {stored.size} bytes instead of {before[0]}")
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


def files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder but this node's own."""
    for path in folder.rglob("*"):
        if not path.name.endswith(_OWN) and path.is_file():
            yield path


def listed(folder: Path) -> dict[str, Any]:
    """`FileInfo` of pyarrow for all files below a folder in the bucket, by relative name."""
    from pyarrow.fs import FileSelector

    system, key = remote(folder)
    infos = system.get_file_info(FileSelector(key, recursive=True, allow_not_found=True))
    return {info.path.removeprefix(f"{key}/"): info for info in infos if info.is_file}


def stamp(path: Path) -> tuple[int, int]:
    """Bytes of a file and when it was written, by which a change of it is known."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _parts(path: str | Path) -> tuple[str, str, str] | None:
    """Side, protocol, and the rest of a copy's path."""
    parts = Path(path).parts
    if _COPIES not in parts:
        return None
    side, protocol, *rest = parts[parts.index(_COPIES) + 1 :]
    return side, protocol, "/".join(rest)


def remote(path: Path) -> tuple[Any, str]:
    """The file system of pyarrow and the path in it of what a path is a copy of."""
    parts = _parts(path)
    if parts is None:
        raise ValueError(f"{path} is no copy")
    _, protocol, rest = parts
    return file_system(f"{protocol}://{rest}")


def file_system(url: str) -> tuple[Any, str]:
    """The file system of pyarrow that a URL is in, and the path in it.

    Raises:
        OSError: when there is no such bucket.
    """
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
