"""Finding, opening and fingerprinting source files, local or on any remote file system."""

import bz2
import contextlib
import glob
import gzip
import io
import json
import lzma
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from orpo_ray.preference.errors import DataError
from orpo_ray.storage.bucket import file_system

LINES, ARRAYS, TABLES = (".jsonl", ".ndjson"), (".json",), (".csv", ".tsv")
PARQUET, ARROW = (".parquet",), (".arrow", ".feather")
KINDS = (*LINES, *ARRAYS, *TABLES, *PARQUET, *ARROW)
# pyarrow has file systems for these; every other protocol is left to fsspec.
_PYARROW_URLS = ("s3://", "gs://", "gcs://")
_BUFFER_BYTES = 4 << 20
# Prefix of a bucket's name that asks for access without credentials.
_ANONYMOUS = "anonymous@"
# Not every HTTP server supports range requests, so these are read from the start.
STREAMED = ("http://", "https://")


def kind_of(path: str) -> str:
    """Return the suffix that determines the reader, ignoring a compression suffix."""
    for packed in COMPRESSIONS:
        path = path.removesuffix(packed)
    return PurePosixPath(path).suffix


def find_files(patterns: Sequence[str]) -> list[str]:
    """Resolve paths, globs, folders and URLs to files, without repeats.

    The files of one pattern are sorted; those of a folder written by `datasets.save_to_disk` keep
    their order.

    Raises:
        DataError: with every pattern that matches no file and every unsupported or empty file.
    """
    found: dict[str, str] = {}
    problems = []
    for pattern in patterns:
        try:
            matches = _remote_matches(pattern) if "://" in pattern else _local_matches(pattern)
            problems += [f"{path}: {what}" for path in matches if (what := _file_problem(path))]
        except DataError as error:
            problems += error.lines
            continue
        except Exception as error:
            # Every file system raises its own exceptions; those of aiohttp are no OSError.
            problems.append(f"{pattern}: cannot be listed: {type(error).__name__}: {error}")
            continue
        if not matches:
            folder = Path(pattern).expanduser().is_dir()
            what = f"no file in it ends in {_KINDS_TEXT}" if folder else "no such file or folder"
            problems.append(f"{pattern}: {what}")
        for path in matches:
            found.setdefault(path if "://" in path else str(Path(path).resolve()), path)
    if problems:
        raise DataError(problems)
    return list(found.values())


def _file_problem(path: str) -> str | None:
    """Why a file cannot be read, as far as its name and size tell; else None."""
    if not path.endswith(SUFFIXES):
        return f"not a supported file type ({_KINDS_TEXT})"
    return "is empty" if file_fingerprint(path)[0] == 0 else None


def _local_matches(pattern: str) -> list[str]:
    """Match a local path, glob or folder; a folder means all supported files below it."""
    expanded = Path(pattern).expanduser()
    if expanded.is_dir():
        saved = _saved_to_disk(str(expanded), lambda name: (expanded / name).open("rb"))
        if saved is not None:
            return [str((expanded / name).resolve()) for name in saved]
        below = [path for path in expanded.rglob("*") if path.name.endswith(SUFFIXES)]
    else:
        below = [Path(path) for path in glob.glob(str(expanded), recursive=True)]
    if expanded.is_file():  # its name may contain glob characters
        below = [expanded]
    # Symlinks are not resolved: in the hub's cache they point to files without a suffix.
    return sorted(os.path.abspath(path) for path in below if path.is_file())


def _saved_to_disk(folder: str, open_in: Callable[[str], Any]) -> list[str] | None:
    """List the files of a folder written by `datasets.save_to_disk`; None for other folders."""

    def content(name: str) -> Any:
        try:
            with open_in(name) as file:
                return json.load(file)
        except (FileNotFoundError, ValueError):
            return {}

    splits = content("dataset_dict.json").get("splits")
    if splits:
        raise DataError(
            [f"{folder}: contains the splits {', '.join(splits)}; give the folder of one"]
        )
    files = content("state.json").get("_data_files")
    return None if files is None else [file["filename"] for file in files]


def _remote_matches(pattern: str) -> list[str]:
    """Match a URL, with a glob or of a folder, on its file system."""
    system, path = _filesystem(pattern)
    protocol, _, rest = pattern.partition("://")
    head = f"{protocol}://{_ANONYMOUS if rest.startswith(_ANONYMOUS) else ''}"
    if pattern.startswith(STREAMED):  # isdir and glob would download the page
        return [pattern] if system.exists(path) else []
    if system.isdir(path):
        saved = _saved_to_disk(pattern, lambda name: system.open(f"{path}/{name}", "rb"))
        if saved is not None:
            return [f"{pattern.rstrip('/')}/{name}" for name in saved]
        paths = [name for name in system.find(path) if name.endswith(SUFFIXES)]
    else:
        paths = [path] if system.exists(path) else system.glob(path)
    return sorted(f"{head}{name}" for name in paths)


def _filesystem(url: str) -> tuple[Any, str]:
    """Return a file system with fsspec's interface and the path of `url` in it."""
    import fsspec
    from fsspec.implementations.arrow import ArrowFSWrapper

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
    system, inner = _filesystem(path)
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
            system, inner = _filesystem(path)
            raw: Any = stack.enter_context(system.open(inner, "rb"))
            if path.startswith(_PYARROW_URLS) and not seekable:
                # Unbuffered, readline would send a request for every byte.
                raw = stack.enter_context(io.BufferedReader(raw.stream, _BUFFER_BYTES))
        else:
            raw = stack.enter_context(open(path, "rb"))
        packed = PurePosixPath(path).suffix
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
SUFFIXES = (*KINDS, *(kind + packed for kind in KINDS for packed in COMPRESSIONS))
_KINDS_TEXT = f"{', '.join(KINDS)}, also with {', '.join(COMPRESSIONS)}"
