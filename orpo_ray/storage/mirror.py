"""Keeping the copy of a folder in step with the bucket that it is of; in every process of a run.

Code works on paths. It calls `publish` for what the bucket is to have and `fetch` for what the
bucket has; for a path that is no copy (`orpo_ray.storage.bucket`) both do nothing: there the disk
is the storage, as it is of a shared file system.
"""

import contextlib
import fcntl
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from orpo_ray.storage.bucket import (
    FETCHING,
    download,
    files_below,
    is_copy,
    listed,
    make_folder,
    remote,
    stamp,
    upload,
)

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


def publish(*paths: Path) -> None:
    """Let others find files, and all files of folders; the last path is there last.

    Raises:
        OSError: when that cannot be done.
    """
    for path in paths:
        if is_copy(path):
            files = [path] if path.is_file() else list(files_below(path))
            with ThreadPoolExecutor(_THREADS) as threads:
                list(threads.map(upload, files))


def fetch(path: Path) -> Path:
    """Bring a file to what the bucket has of it, nothing included; gives the path back."""
    if is_copy(path):
        system, key = remote(path)
        download(system, system.get_file_info(key), path)
    return path


def fetch_once(path: Path) -> Path:
    """Fetch a file that never changes unless it is here."""
    return path if path.exists() else fetch(path)


def fetch_folder(folder: Path, wanted: Names = everything) -> Path:
    """Bring all `wanted` files below a folder to what the bucket has; gives the folder back.

    A folder that the bucket does not have is none here either. Processes of one node that ask for
    the same do it one after the other, so once.

    Args:
        folder: nothing is done for one that is no copy.
        wanted: told the names of files, relative to the folder.

    Raises:
        OSError: when the bucket cannot be read.
    """
    if not is_copy(folder):
        return folder
    make_folder(folder)
    with (folder.parent / f".{folder.name}{FETCHING}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        there = listed(folder)
        if not there:
            shutil.rmtree(folder)
            return folder
        system, _ = remote(folder)
        found = {name: info for name, info in there.items() if wanted(name)}
        for path in files_below(folder):
            name = path.relative_to(folder).as_posix()
            if wanted(name) and name not in found:
                path.unlink(missing_ok=True)
        with ThreadPoolExecutor(_THREADS) as threads:
            list(threads.map(lambda n: download(system, found[n], folder / n), found))
    return folder


def sizes(folder: Path) -> dict[str, int]:
    """The files of a folder by name, where it is stored, with their bytes."""
    if is_copy(folder):
        return {name: info.size for name, info in listed(folder).items() if "/" not in name}
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}


def remove(path: Path) -> None:
    """Delete a file or a folder with all that is in it, here and in the bucket."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    if is_copy(path):
        system, key = remote(path)
        info = system.get_file_info(key)
        with contextlib.suppress(FileNotFoundError):
            if info.is_file:
                system.delete_file(key)
            elif info.type.name == "Directory":
                system.delete_dir(key)


def forget_heavy(folder: Path) -> None:
    """Delete the large files of a copy, which the bucket has, from this node's disk."""
    for path in files_below(folder) if is_copy(folder) else ():
        if not light(path.name):
            path.unlink(missing_ok=True)


def rename(path: Path, target: Path) -> None:
    """Move a file or a folder to where there is none, here and in the bucket."""
    path.rename(target)
    if is_copy(path):
        system, key = remote(path)
        _, target_key = remote(target)
        info = system.get_file_info(key)
        names = [""] if info.is_file else [f"/{name}" for name in listed(path)]
        for name in names:
            system.copy_file(key + name, target_key + name)
        remove(path)


def age_s(path: Path) -> float | None:
    """Seconds since a file was published, by the clock of the bucket; None where there is none."""
    system, key = remote(path)
    info = system.get_file_info(key)
    if not info.is_file:
        return None
    probe = path.with_name(f".now-{os.getpid()}")
    with system.open_output_stream(remote(probe)[1]) as file:
        file.write(b"now")
    now = system.get_file_info(remote(probe)[1]).mtime_ns
    remove(probe)
    return float((now - info.mtime_ns) / 1e9)


@contextlib.contextmanager
def kept_in_step(folder: Path, publishes: Names, fetches: Names) -> Iterator[None]:
    """While it lasts, publish what changes in a copy and fetch what others change.

    There is a round every few seconds, in a thread, and one at the end; what a round cannot do the
    next one does.

    Args:
        folder: as it is now, it is in step.
        publishes: names, relative to it, of files that only this process writes.
        fetches: names of files that only others write.

    Raises:
        OSError: when the last round cannot be done.
    """
    if not is_copy(folder):
        yield
        return
    rounds = _Rounds(folder, publishes, fetches)
    ended = threading.Event()
    thread = threading.Thread(target=rounds.go_on, args=(ended,), name="orpo-copy", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError):
            rounds.go_round()
        raise
    ended.set()
    thread.join()
    rounds.go_round()


class _Rounds:
    """What has been published of a folder, and what to do about the rest."""

    def __init__(self, folder: Path, publishes: Names, fetches: Names) -> None:
        self._folder, self._publishes, self._fetches = folder, publishes, fetches
        self._published = {path: stamp(path) for path in files_below(folder)}

    def go_on(self, ended: threading.Event) -> None:
        pause_s = _ROUND_S
        while not ended.wait(pause_s):
            started = time.monotonic()
            with contextlib.suppress(OSError):
                self.go_round()
            pause_s = max(_ROUND_S, (time.monotonic() - started) / _ROUND_SHARE)

    def go_round(self) -> None:
        for path in files_below(self._folder):
            if not self._publishes(path.relative_to(self._folder).as_posix()):
                continue
            with contextlib.suppress(FileNotFoundError):  # gone meanwhile
                if self._published.get(path) != stamp(path):
                    self._published[path] = upload(path)
        system, _ = remote(self._folder)
        for name, info in listed(self._folder).items():
            if self._fetches(name):
                download(system, info, self._folder / name)
