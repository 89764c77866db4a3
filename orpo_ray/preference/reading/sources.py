"""Opening and fingerprinting source files, local or on any remote file system."""

import bz2
import contextlib
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from orpo_ray.storage.bucket import file_system
from orpo_ray.storage.names import refuse_unsafe_file_url

LINES, ARRAYS, TABLES = (".jsonl", ".ndjson"), (".json",), (".csv", ".tsv")
PARQUET, ARROW = (".parquet",), (".arrow", ".feather")
KINDS = (*LINES, *ARRAYS, *TABLES, *PARQUET, *ARROW)
# pyarrow has file systems for these; every other protocol is left to fsspec.
_PYARROW_URLS = ("s3://", "gs://", "gcs://")
_BUFFER_BYTES = 4 << 20
# Not every HTTP server supports range requests, so these are read from the start.
STREAMED = ("http://", "https://")


def kind_of(path: str) -> str:
    """Return the suffix that determines the reader, in small letters, without a compression's."""
    path = path.lower()
    for packed in COMPRESSIONS:
        path = path.removesuffix(packed)
    return PurePosixPath(path).suffix


def is_supported(path: str) -> bool:
    """Whether the name of a file ends as that of a format that can be read."""
    return path.lower().endswith(_SUFFIXES)


def is_plain(path: str, kinds: tuple[str, ...]) -> bool:
    """Whether the name of a file ends as one of `kinds`, without a compression's suffix."""
    return path.lower().endswith(kinds)


def remote_file_system(url: str) -> tuple[Any, str]:
    """Return a file system with fsspec's interface and the path of `url` in it.

    Raises:
        UnsafeNameError: for a URL with `..`, `.` or empty parts.
    """
    import fsspec
    from fsspec.implementations.arrow import ArrowFSWrapper

    refuse_unsafe_file_url(url)
    if url.startswith(_PYARROW_URLS):
        system, path = file_system(url)
        return ArrowFSWrapper(system), path
    system, path = fsspec.core.url_to_fs(url)
    return system, path


def file_fingerprint(path: str) -> tuple[int | None, Any]:
    """Return what changes with a file's content: its size in bytes (None if unknown) and metadata.

    The metadata is the modification time of a local file, and all that its file system reports of
    a remote one.
    """
    if "://" not in path:
        stat = Path(path).stat()
        return stat.st_size, stat.st_mtime_ns
    system, inner = remote_file_system(path)
    info = system.info(inner)
    return info.get("size"), json.dumps(info, sort_keys=True, default=str)


@contextlib.contextmanager
def open_file(path: str, seekable: bool = False) -> Iterator[Any]:
    """Open a file for reading bytes, decompressed according to its suffix.

    Args:
        path: absolute path or URL.
        seekable: whether the caller needs `seek`; a compressed file or one behind HTTP is then read
            into memory.
    """
    with contextlib.ExitStack() as stack:
        if "://" in path:
            system, inner = remote_file_system(path)
            raw: Any = stack.enter_context(system.open(inner, "rb"))
            if path.startswith(_PYARROW_URLS) and not seekable:
                # Unbuffered, readline would send a request for every byte.
                raw = stack.enter_context(io.BufferedReader(raw.stream, _BUFFER_BYTES))
        else:
            raw = stack.enter_context(open(path, "rb"))
        packed = PurePosixPath(path).suffix.lower()
        file = stack.enter_context(_UNPACK[packed](raw)) if packed in _UNPACK else raw
        whole = seekable and (packed in _UNPACK or path.startswith(STREAMED))
        yield io.BytesIO(file.read()) if whole else file


def _unpack_zstd(raw: Any) -> Any:
    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw), "zstd"))


_UNPACK: dict[str, Callable[[Any], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _unpack_zstd,
}
COMPRESSIONS = tuple(_UNPACK)
_SUFFIXES = (*KINDS, *(kind + packed for kind in KINDS for packed in COMPRESSIONS))
KINDS_TEXT = f"{', '.join(KINDS)}, also with {', '.join(COMPRESSIONS)}"
