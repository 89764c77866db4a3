"""Files that are written whole or not at all, and JSON read from them."""

import contextlib
import errno
import fcntl
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from orpo_ray.storage.hiding import hide

_SHOWN_NAMES = 3


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path to write to; at the end what was written there replaces `path`, on disk.

    A reader finds the old file or the new one, also after a crash. On an error the old one stays.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(path: Path, waits: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Hold a lock file, once another process has released it or has ended.

    On a file system without locks nothing is held.

    Args:
        path: of the file, which is made if missing; its folder must exist.
        waits: called once if another process holds it.
    """
    with path.open("a") as file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waits()
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        yield


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that it is whole or absent, and on disk; text as UTF-8."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    """Write JSON as one line, or indented, with `write_atomic`."""
    write_atomic(path, json.dumps(content, indent=indent) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no file.

    Raises:
        ValueError: for a file that holds something else.
    """
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return content


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a file of JSON lines, if there is one; a torn last one is left out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in whole.splitlines()]


def one_line(error: BaseException | str) -> str:
    """The whole text of an error on one line, without secrets."""
    return hide(" ".join(str(error).split()))


def first_line(error: BaseException | str) -> str:
    """The first line of an error, whose others are a traceback or advice, without secrets."""
    return hide(next(iter(str(error).strip().splitlines()), ""))


def _sync(path: Path) -> None:
    """Have the operating system write a file, or the names in a folder, to its disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def some_of(names: Sequence[str]) -> str:
    """The first few of some names, and how many more there are."""
    shown = ", ".join(names[:_SHOWN_NAMES])
    more = len(names) - _SHOWN_NAMES
    return f"{shown} and {more} more" if more > 0 else shown
