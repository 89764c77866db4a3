"""Files of preference pairs: finding them, cutting them into splits, reading their rows."""

import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orpo_ray.preference.errors import DataError
from orpo_ray.preference.records import Reason

LINES, ARRAYS, PARQUET = (".jsonl", ".jsonl.gz"), (".json", ".json.gz"), (".parquet",)
SUFFIXES = (*LINES, *ARRAYS, *PARQUET)
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Split:
    """A stretch of one file that a data task reads.

    Args:
        path: absolute path of the file.
        first_row: 0-based number of its first row: line, array element or Parquet row.
        n_rows: rows in it, or None to the end of the file.
        first_byte: where its first line begins, for plain JSONL.
    """

    path: str
    first_row: int = 0
    n_rows: int | None = None
    first_byte: int = 0


@dataclass(frozen=True)
class RawRow:
    """One row of a file: its record, or why it has none.

    Args:
        number: 0-based row number in the file.
        record: the decoded object.
        problem: set when there is no record.
        excerpt: the row's text as far as it is known, for the quarantine.
    """

    number: int
    record: Mapping[str, Any] | None
    problem: Reason | None = None
    excerpt: str = ""


def find_files(patterns: Sequence[str]) -> list[str]:
    """Files that paths, globs and folders stand for; sorted within each, without repeats.

    Raises:
        DataError: naming every pattern that matches nothing and every file of another kind.
    """
    found: dict[str, None] = {}
    problems = []
    for pattern in patterns:
        matches = _matches(pattern)
        if not matches:
            folder = Path(pattern).expanduser().is_dir()
            what = (
                f"no file in it ends in {', '.join(SUFFIXES)}"
                if folder
                else "no such file or folder"
            )
            problems.append(f"{pattern}: {what}")
        for path in matches:
            if not path.endswith(SUFFIXES):
                problems.append(f"{path}: not a kind of file that is read ({', '.join(SUFFIXES)})")
            elif Path(path).stat().st_size == 0:
                problems.append(f"{path}: is empty")
        found |= dict.fromkeys(matches)
    if problems:
        raise DataError(problems)
    return list(found)


def _matches(pattern: str) -> list[str]:
    """Absolute paths for one pattern; of a folder, the files below it that can be read."""
    expanded = Path(pattern).expanduser()
    if expanded.is_dir():
        below = [path for path in expanded.rglob("*") if path.name.endswith(SUFFIXES)]
    else:
        below = [Path(path) for path in glob.glob(str(expanded), recursive=True)]
    if expanded.is_file():  # also where its name holds a character of globs
        below = [expanded]
    return sorted(str(path.resolve()) for path in below if path.is_file())


def split_file(path: str, rows_per_split: int) -> list[Split]:
    """Cut a file so that many tasks can read it; archives and arrays stay whole.

    Raises:
        DataError: for a Parquet file that cannot be opened.
    """
    if path.endswith(PARQUET):
        n_rows = _open_parquet(path).metadata.num_rows
        firsts = range(0, n_rows, rows_per_split)
        return [Split(path, first, min(rows_per_split, n_rows - first)) for first in firsts]
    if path.endswith(".jsonl"):
        return _split_lines(path, rows_per_split)
    return [Split(path)]


def _split_lines(path: str, rows_per_split: int) -> list[Split]:
    """Splits of `rows_per_split` lines, by looking for line ends only."""
    splits, start, row, offset = [], 0, 0, 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            end = block.find(b"\n")
            while end >= 0:
                row += 1
                if row % rows_per_split == 0:
                    splits.append(Split(path, row - rows_per_split, rows_per_split, start))
                    start = offset + end + 1
                end = block.find(b"\n", end + 1)
            offset += len(block)
    if offset > start:
        first_row = len(splits) * rows_per_split
        splits.append(Split(path, first_row, row - first_row + 1, start))
    return splits


def read_split(split: Split) -> Iterator[RawRow]:
    """The rows of a split in order; blank lines are passed over but numbered.

    Raises:
        DataError: for a file that cannot be read on: a torn archive, a damaged Parquet file, a
            JSON file that is no array.
    """
    try:
        if split.path.endswith(PARQUET):
            yield from _read_parquet(split)
        elif split.path.endswith(LINES):
            with _open(split.path) as file:
                yield from _read_lines(file, split)
        else:
            yield from _read_array(split.path)
    except (OSError, EOFError, zlib.error, pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise DataError([f"{split.path}: cannot be read: {error}"]) from error


def _open(path: str) -> io.BufferedIOBase:
    return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")


def _open_parquet(path: str) -> Any:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError([f"{path}: not a Parquet file, or a damaged one: {error}"]) from error


def _read_lines(file: io.BufferedIOBase, split: Split) -> Iterator[RawRow]:
    file.seek(split.first_byte)
    for index, line in enumerate(file):
        if split.n_rows is not None and index >= split.n_rows:
            return
        if index == 0 and split.first_row == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield _decoded(split.first_row + index, line)


def _decoded(number: int, line: bytes) -> RawRow:
    """Parse one line; UTF-8 and JSON errors are the row's, not the file's."""
    excerpt = line[:800].decode(errors="replace").strip()
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return RawRow(number, None, Reason.MALFORMED_JSON, excerpt)
    return _row(number, record, excerpt)


def _row(number: int, record: Any, excerpt: str = "") -> RawRow:
    if not isinstance(record, dict):
        return RawRow(number, None, Reason.NOT_AN_OBJECT, excerpt or str(record)[:200])
    return RawRow(number, record, excerpt=excerpt)


def _read_array(path: str) -> Iterator[RawRow]:
    """The elements of a JSON array; a `.json` file that holds JSON lines is read as such."""
    with _open(path) as file:
        content = file.read().removeprefix(b"\xef\xbb\xbf")
    try:
        array = json.loads(content)
    except (ValueError, RecursionError) as error:
        if content.lstrip()[:1] == b"{":
            yield from _read_lines(io.BytesIO(content), Split(path))
            return
        raise DataError([f"{path}: not a JSON array: {error}"]) from error
    for number, record in enumerate(array if isinstance(array, list) else [array]):
        yield _row(number, record)


def _read_parquet(split: Split) -> Iterator[RawRow]:
    """Rows of a Parquet file, opening only the row groups that hold some of them."""
    file = _open_parquet(split.path)
    stop = split.first_row + (split.n_rows or 0)
    number = 0
    for group in range(file.num_row_groups):
        n_rows = file.metadata.row_group(group).num_rows
        if number + n_rows > split.first_row and number < stop:
            first = max(0, split.first_row - number)
            table = file.read_row_group(group).slice(first, stop - number - first)
            for index, record in enumerate(table.to_pylist()):
                yield RawRow(number + first + index, record)
        number += n_rows
