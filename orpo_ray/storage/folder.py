"""A folder to work on, which may be the copy of one in a bucket; in every process of a run."""

import contextlib
import fcntl
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from orpo_ray.storage import files
from orpo_ray.storage.bucket import (
    FETCHING,
    download,
    file_system,
    files_below,
    listed,
    stamp,
    upload,
)
from orpo_ray.storage.names import refuse_unsafe_name, refuse_unsafe_url
from orpo_ray.storage.scratch import copies_root, make_own

# Who works on copies. Each has copies of its own, also on one node, so that it makes no difference
# on which node a worker is.
DRIVER, WORKERS, VIEWS = "driver", "workers", "views"
# What is large: weights, which only those fetch who read them.
HEAVY = (".distcp", ".safetensors")
_THREADS = 8
_ROUND_S, _ROUND_SHARE = 2.0, 0.05

Names = Callable[[str], bool]


def light(name: str) -> bool:
    """Whether a file is none of the large ones."""
    return not name.endswith(HEAVY)


def everything(name: str) -> bool:
    """Every file."""
    return True


class Folder:
    """A folder on a disk, or the copy of one in a bucket.

    Files are read and written at `path`. `publish` stores in the bucket what others are to find,
    `fetch` brings what the bucket has; where the disk itself is the storage, as with a shared file
    system, both do nothing.

    A folder is pickled as its path and URL: the driver decides where copies lie, and that is the
    same on every node. It is a `PathLike` of its path, and as text its address.

    Args:
        path: absolute.
        url: what `path` is a copy of; None for a folder on a disk.
        root: of all copies; it is this user's alone.
    """

    def __init__(self, path: Path, url: str | None = None, root: Path | None = None) -> None:
        self.path, self.url, self._root = path, url, root
        # One upload of a file at a time: of a file that grows the older one might stay.
        self._uploading: dict[Path, threading.Lock] = {}

    @staticmethod
    def at(place: "FolderLike", side: str = DRIVER) -> "Folder":
        """The folder at a path or a URL, as one side works on it; a folder is itself.

        `s3://bucket/runs` is worked on at `<scratch>/orpo_ray-copies/driver/s3/bucket/runs`.
        <scratch> is ORPO_RAY_SCRATCH, else a folder of the user in the system's temporary one.

        Raises:
            UnsafeNameError: for a URL with `..`, `.` or empty parts.
        """
        if isinstance(place, Folder):
            return place
        protocol, separator, rest = str(place).partition("://")
        if not separator:
            return Folder(Path(place).expanduser().resolve())
        refuse_unsafe_url(str(place))
        root, inner = copies_root(), rest.removesuffix("/")
        return Folder(root / side / protocol / inner, f"{protocol}://{inner}", root)

    def on(self, side: str) -> "Folder":
        """The same folder as another side works on it."""
        return self if self.url is None else Folder.at(self.url, side)

    def __truediv__(self, name: str) -> "Folder":
        """A folder below this one.

        Raises:
            UnsafeNameError: for a name with `..`, `.` or empty parts; so do all methods with one.
        """
        url = None if self.url is None else f"{self.url}/{name}"
        below = Folder(self._below(name), url, self._root)
        below._uploading = self._uploading
        return below

    def _below(self, name: str) -> Path:
        refuse_unsafe_name(name, self)
        return self.path / name

    @property
    def parent(self) -> "Folder":
        """The folder that this one is in."""
        url = None if self.url is None else self.url.rpartition("/")[0]
        return Folder(self.path.parent, url, self._root)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.name

    @property
    def address(self) -> str:
        """The URL that it is a copy of, else its path."""
        return self.url or str(self.path)

    def __str__(self) -> str:
        return self.address

    def __repr__(self) -> str:
        return f"Folder({self.address})"

    def __fspath__(self) -> str:
        return str(self.path)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Folder) and (self.path, self.url) == (other.path, other.url)

    def __hash__(self) -> int:
        return hash((self.path, self.url))

    def __reduce__(self) -> tuple[Any, ...]:
        return Folder, (self.path, self.url, self._root)

    def make(self) -> "Folder":
        """Make the folder; that of a copy is for this user alone.

        Raises:
            PermissionError: when a level of the copy's path is another user's or a link.
        """
        self._make(self.path)
        return self

    def _make(self, folder: Path) -> None:
        if self._root is not None:
            make_own(self._root, folder)
        else:
            folder.mkdir(parents=True, exist_ok=True)

    def write_text(self, name: str, text: str) -> Path:
        """Write and publish a file, whole or not at all."""
        files.write_atomic(self.path / name, text)
        self.publish(name)
        return self.path / name

    def write_json(self, name: str, content: Any, indent: int | None = None) -> Path:
        """Write and publish JSON, whole or not at all."""
        files.write_json(self.path / name, content, indent)
        self.publish(name)
        return self.path / name

    @contextlib.contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """Give a path to write to; what was written replaces a file, and is published."""
        with files.replacing(self.path / name) as temporary:
            yield temporary
        self.publish(name)

    def read_json(self, name: str) -> dict[str, Any]:
        """The JSON object in a file as it is stored; empty where there is no file."""
        return files.read_json(self.fetch_file(name))

    def publish(self, *names: str) -> None:
        """Let others find files, and all files of folders below; the last name is there last.

        Raises:
            OSError: when that cannot be done.
        """
        for part in (names[:-1], names[-1:]) if self.url is not None else ():
            found: list[Path] = []
            for path in (self.path / name for name in part):
                found += [path] if path.is_file() else files_below(path)
            with ThreadPoolExecutor(_THREADS) as threads:
                list(threads.map(self.upload_file, found))

    def publish_all(self) -> None:
        """Let others find all files of the folder."""
        self.publish("")

    def upload_file(self, path: Path) -> tuple[int, int]:
        """Publish a file of a copy by its path; returns the stamp of what was published."""
        with self._uploading.setdefault(path, threading.Lock()):
            return upload(path, f"{self.url}/{path.relative_to(self.path).as_posix()}")

    def fetch_file(self, name: str, once: bool = False) -> Path:
        """Bring a file to what the bucket has of it, nothing included; gives its path.

        Args:
            name: relative to this folder.
            once: for a file that never changes: what is here is taken.
        """
        path = self._below(name)
        if self.url is not None and not (once and path.exists()):
            self._make(path.parent)
            system, key = file_system(f"{self.url}/{name}")
            download(system, system.get_file_info(key), path)
        return path

    def fetch(self, wanted: Names = everything) -> "Folder":
        """Bring all `wanted` files to what the bucket has; gives the folder back.

        A folder that the bucket does not have is none here either. Processes of one node that ask
        for the same do it one after the other, so once.

        Args:
            wanted: told the names of files, relative to the folder.

        Raises:
            OSError: when the bucket cannot be read.
        """
        if self.url is None:
            return self
        self.make()
        with (self.path.parent / f".{self.name}{FETCHING}").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            there = listed(self.url)
            if not there:
                shutil.rmtree(self.path)
                return self
            system, _ = file_system(self.url)
            found = {name: info for name, info in there.items() if wanted(name)}
            for parent in {(self.path / name).parent for name in found}:
                self._make(parent)
            for path in files_below(self.path):
                name = path.relative_to(self.path).as_posix()
                if wanted(name) and name not in found:
                    path.unlink(missing_ok=True)
            with ThreadPoolExecutor(_THREADS) as threads:
                list(threads.map(lambda n: download(system, found[n], self.path / n), found))
        return self

    def fetch_again(self) -> "Folder":
        """Fetch everything of a copy, also what seems to be here already."""
        if self.url is not None:
            self.make()
            shutil.rmtree(self.path, ignore_errors=True)
        return self.fetch()

    def sizes(self) -> dict[str, int]:
        """The files of the folder by name, where it is stored, with their bytes."""
        if self.url is not None:
            return {name: info.size for name, info in listed(self.url).items() if "/" not in name}
        return {path.name: path.stat().st_size for path in self.path.iterdir() if path.is_file()}

    def remove(self, name: str = "") -> None:
        """Delete a file or a folder with all that is in it, here and in the bucket.

        Args:
            name: relative to this folder, which itself is deleted without one.
        """
        path = self._below(name) if name else self.path
        if self.url is not None:
            self._make(path.parent)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        if self.url is not None:
            system, key = file_system(f"{self.url}/{name}")
            info = system.get_file_info(key)
            with contextlib.suppress(FileNotFoundError):
                if info.is_file:
                    system.delete_file(key)
                elif info.type.name == "Directory":
                    system.delete_dir(key)

    def rename(self, name: str, target: str) -> None:
        """Move a file or a folder below this one to where there is none, here and in the bucket."""
        self._below(name).rename(self._below(target))
        if self.url is not None:
            system, key = file_system(f"{self.url}/{name}")
            _, target_key = file_system(f"{self.url}/{target}")
            info = system.get_file_info(key)
            below = [""] if info.is_file else [f"/{n}" for n in listed(f"{self.url}/{name}")]
            for rest in below:
                system.copy_file(key + rest, target_key + rest)
            self.remove(name)

    def forget_heavy(self) -> None:
        """Delete the large files of a copy, which the bucket has, from this node's disk."""
        for path in files_below(self.path) if self.url is not None else ():
            if not light(path.name):
                path.unlink(missing_ok=True)

    def age_s(self, name: str) -> float | None:
        """Seconds since a file was published, by the bucket's clock; None where there is none."""
        system, key = file_system(f"{self.url}/{name}")
        info = system.get_file_info(key)
        if not info.is_file:
            return None
        probe = f"{key.rpartition('/')[0]}/.now-{os.getpid()}"
        with system.open_output_stream(probe) as file:
            file.write(b"now")
        now = system.get_file_info(probe).mtime_ns
        system.delete_file(probe)
        return float((now - info.mtime_ns) / 1e9)

    @contextlib.contextmanager
    def kept_in_step(self, publishes: Names, fetches: Names) -> Iterator[None]:
        """While it lasts, publish what changes in a copy and fetch what others change.

        There is a round every few seconds, in a thread, and one at the end; what a round cannot do
        the next one does. As the folder is now, it is in step.

        Args:
            publishes: names, relative to it, of files that only this process writes.
            fetches: names of files that only others write.

        Raises:
            OSError: when the last round cannot be done.
        """
        if self.url is None:
            yield
            return
        rounds = _Rounds(self, self.url, publishes, fetches)
        ended = threading.Event()
        thread = threading.Thread(
            target=rounds.repeat, args=(ended,), name="orpo-copy", daemon=True
        )
        thread.start()
        try:
            yield
        except BaseException:
            ended.set()
            thread.join()
            with contextlib.suppress(OSError):
                rounds.run()
            raise
        ended.set()
        thread.join()
        rounds.run()


FolderLike = str | Path | Folder
"""A folder, or the path or URL of one that the driver works on."""


class _Rounds:
    """What has been published of a folder, and what to do about the rest."""

    def __init__(self, folder: Folder, url: str, publishes: Names, fetches: Names) -> None:
        self._folder, self._url = folder, url
        self._publishes, self._fetches = publishes, fetches
        self._published = {path: stamp(path) for path in files_below(folder.path)}

    def repeat(self, ended: threading.Event) -> None:
        pause_s = _ROUND_S
        while not ended.wait(pause_s):
            started = time.monotonic()
            with contextlib.suppress(OSError):
                self.run()
            pause_s = max(_ROUND_S, (time.monotonic() - started) / _ROUND_SHARE)

    def run(self) -> None:
        root = self._folder.path
        for path in files_below(root):
            if not self._publishes(path.relative_to(root).as_posix()):
                continue
            with contextlib.suppress(FileNotFoundError):  # gone meanwhile
                if self._published.get(path) != stamp(path):
                    self._published[path] = self._folder.upload_file(path)
        system, _ = file_system(self._url)
        for name, info in listed(self._url).items():
            if self._fetches(name):
                download(system, info, root / name)
