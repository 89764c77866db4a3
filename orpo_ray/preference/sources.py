"""Files of preference pairs: finding them on any file system, opening them, telling them apart."""

import bz2
import contextlib
import glob
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from orpo_ray.preference.errors import DataError

LINES, ARRAYS, TABLES = (".jsonl", ".ndjson"), (".json",), (".csv", ".tsv")
PARQUET, ARROW = (".parquet",), (".arrow", ".feather")
KINDS = (*LINES, *ARRAYS, *TABLES, *PARQUET, *ARROW)
# pyarrow brings these file systems; every other protocol is fsspec's.
_PYARROW_PROTOCOLS = ("s3", "gs", "gcs")
# Not every server of these gives a part of a file.
STREAMED = ("http://", "https://")


def kind_of(path: str) -> str:
    """The suffix that says how a file is read, without the one of its compression."""
    for packed in COMPRESSIONS:
        path = path.removesuffix(packed)
    return PurePosixPath(path).suffix


def find_files(patterns: Sequence[str]) -> list[str]:
    """Files that paths, globs, folders and URLs stand for; sorted within each, without repeats.

    A folder that `datasets.save_to_disk` wrote stands for its files in their order.

    Raises:
        DataError: naming every pattern that matches nothing and every file of another kind.
    """
    found: dict[str, None] = {}
    problems = []
    for pattern in patterns:
        try:
            matches = _remote_matches(pattern) if "://" in pattern else _local_matches(pattern)
            problems += [f"{path}: {what}" for path in matches if (what := _unusable(path))]
        except DataError as error:
            problems += error.lines
            continue
        except (OSError, ValueError, ImportError) as error:
            problems.append(f"{pattern}: cannot be looked at: {error}")
            continue
        if not matches:
            folder = Path(pattern).expanduser().is_dir()
            what = f"no file in it ends in {_KINDS_TEXT}" if folder else "no such file or folder"
            problems.append(f"{pattern}: {what}")
        found |= dict.fromkeys(matches)
    if problems:
        raise DataError(problems)
    return list(found)


def _unusable(path: str) -> str | None:
    """What speaks against a file before it is opened."""
    if not path.endswith(SUFFIXES):
        return f"not a kind of file that is read ({_KINDS_TEXT})"
    return None if identity(path)[0] else "is empty"


def _local_matches(pattern: str) -> list[str]:
    """Absolute paths for one pattern; of a folder, the files below it that can be read."""
    expanded = Path(pattern).expanduser()
    if expanded.is_dir():
        saved = _saved_to_disk(expanded)
        if saved is not None:
            return saved
        below = [path for path in expanded.rglob("*") if path.name.endswith(SUFFIXES)]
    else:
        below = [Path(path) for path in glob.glob(str(expanded), recursive=True)]
    if expanded.is_file():  # also where its name holds a character of globs
        below = [expanded]
    return sorted(str(path.resolve()) for path in below if path.is_file())


def _saved_to_disk(folder: Path) -> list[str] | None:
    """The files of a folder of `datasets.save_to_disk`, or None where it is no such folder."""
    splits, state = folder / "dataset_dict.json", folder / "state.json"
    if splits.is_file():
        names = json.loads(splits.read_text())["splits"]
        raise DataError([f"{folder}: holds the splits {', '.join(names)}; name one of the folders"])
    if not state.is_file():
        return None
    files = json.loads(state.read_text())["_data_files"]
    return [str((folder / file["filename"]).resolve()) for file in files]


def _remote_matches(pattern: str) -> list[str]:
    """The same for a URL."""
    system, path = _filesystem(pattern)
    protocol = pattern.partition("://")[0]
    if system.isdir(path):
        paths = [name for name in system.find(path) if name.endswith(SUFFIXES)]
    else:
        paths = [path] if system.exists(path) else system.glob(path)
    prefix = "" if pattern.startswith(STREAMED) else f"{protocol}://"
    return sorted(prefix + name for name in paths)


def _filesystem(url: str) -> tuple[Any, str]:
    """A file system with fsspec's interface, and the path of `url` in it."""
    import fsspec
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow import fs

    protocol, _, rest = url.partition("://")
    if protocol in _PYARROW_PROTOCOLS:
        bucket = rest.partition("/")[0]
        return ArrowFSWrapper(fs.FileSystem.from_uri(f"{protocol}://{bucket}")[0]), rest
    system, path = fsspec.core.url_to_fs(url)
    return system, path


def identity(path: str) -> tuple[int, Any]:
    """Size of a file in bytes, and what else tells it from one with other content."""
    if "://" not in path:
        stat = Path(path).stat()
        return stat.st_size, stat.st_mtime_ns
    system, inner = _filesystem(path)
    return int(system.info(inner)["size"] or 0), system.ukey(inner)


@contextlib.contextmanager
def opened(path: str, seekable: bool = False) -> Iterator[Any]:
    """The bytes of a file, unpacked, as a stream.

    Args:
        path: of the file.
        seekable: whether the reader jumps about; a file that cannot is then held in memory.
    """
    with contextlib.ExitStack() as stack:
        if "://" in path:
            system, inner = _filesystem(path)
            raw: Any = stack.enter_context(system.open(inner, "rb"))
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
