"""Reading files of every supported type; JSON and CSV here, Parquet and Arrow in `columns`."""

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from typing import IO, Any

from orpo_ray.preference.errors import DataError
from orpo_ray.preference.reading.columns import (
    READ_ERRORS,
    count_parquet,
    read_arrow,
    read_parquet,
    split_parquet,
)
from orpo_ray.preference.reading.rows import RawRow, Split
from orpo_ray.preference.reading.sources import (
    ARROW,
    LINES,
    PARQUET,
    STREAMED,
    TABLES,
    is_plain,
    kind_of,
    open_file,
)
from orpo_ray.preference.records import Reason

_BLOCK_BYTES = 1 << 20
_UTF8_BOM = b"\xef\xbb\xbf"
# Of lists and objects within one another. Whatever handles a row may recurse to this depth.
_MAX_DEPTH = 100


def split_file(path: str, rows_per_split: int) -> list[Split]:
    """Cut a file into splits; only uncompressed JSON lines and Parquet can be cut.

    Raises:
        DataError: if a Parquet file cannot be opened.
    """
    if is_plain(path, PARQUET):
        return split_parquet(path, rows_per_split)
    if is_plain(path, LINES) and not path.startswith(STREAMED):
        return _split_lines(path, rows_per_split)
    return [Split(path)]


def _split_lines(path: str, rows_per_split: int) -> list[Split]:
    """Cut after every `rows_per_split` newlines, without parsing the lines."""
    splits, start, row, offset = [], 0, 0, 0
    with open_file(path) as file:
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


def count_rows(path: str) -> int:
    """Count the rows of a file, blank lines included, without parsing where possible."""
    if is_plain(path, PARQUET):
        return count_parquet(path)
    if kind_of(path) not in LINES:
        return sum(1 for _ in read_split(Split(path)))
    n_lines, last = 0, b"\n"
    with open_file(path) as file:
        while block := file.read(_BLOCK_BYTES):
            n_lines, last = n_lines + block.count(b"\n"), block[-1:]
    return n_lines + (last != b"\n")


def read_split(split: Split) -> Iterator[RawRow]:
    """Read the rows of a split in order; blank lines are skipped but counted in row numbers.

    Raises:
        DataError: if the file cannot be read to its end, such as a truncated archive, a damaged
            Parquet file or a malformed JSON array.
    """
    kind = kind_of(split.path)
    try:
        if kind in PARQUET:
            yield from read_parquet(split)
        elif kind in ARROW:
            yield from read_arrow(split.path)
        elif kind in TABLES:
            yield from _read_table(split.path, "," if kind == ".csv" else "\t")
        elif kind in LINES:
            with open_file(split.path) as file:
                yield from _read_lines(file, split)
        else:
            yield from _read_array(split.path)
    except (*READ_ERRORS, UnicodeDecodeError, csv.Error) as error:
        raise DataError([f"{split.path}: cannot be read: {error}"]) from error


def _read_lines(file: IO[bytes], split: Split) -> Iterator[RawRow]:
    if split.first_byte:
        file.seek(split.first_byte)
    for index, line in enumerate(file):
        if split.n_rows is not None and index >= split.n_rows:
            return
        if index == 0 and split.first_row == 0:
            line = line.removeprefix(_UTF8_BOM)
        if line.strip():
            yield _decoded(split.first_row + index, line)


def _decoded(number: int, line: bytes) -> RawRow:
    """Parse one line; UTF-8 and JSON errors are recorded in the row, not raised."""
    excerpt = line[:800].decode(errors="replace").strip()
    try:
        record = _parsed(line)
    except UnicodeDecodeError:
        return RawRow(number, None, Reason.NOT_UTF8, excerpt)
    except RecursionError:
        return RawRow(number, None, Reason.TOO_DEEP, excerpt)
    except ValueError:
        whole = line.endswith(
            b"\n"
        )  # only the last line of a file can be without one: it may be cut off
        return RawRow(number, None, Reason.MALFORMED_JSON if whole else Reason.TORN_LINE, excerpt)
    return _row(number, record, excerpt)


def _parsed(content: bytes) -> Any:
    return json.loads(content.decode(), object_pairs_hook=_mark_duplicate_keys)


def _row(number: int, record: Any, excerpt: str = "") -> RawRow:
    problem = _problem(record)
    if problem is Reason.TOO_DEEP:  # and so it cannot be shown as text either
        return RawRow(number, None, problem, excerpt)
    if not isinstance(record, dict):
        return RawRow(number, None, Reason.NOT_AN_OBJECT, excerpt or str(record)[:200])
    if problem:
        return RawRow(number, None, problem, excerpt or str(record)[:200])
    return RawRow(number, record, excerpt=excerpt)


class _DuplicateKeys(dict[str, Any]):
    """A JSON object with a duplicate key; parsers differ in which value they keep."""


def _mark_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    return values if len(values) == len(pairs) else _DuplicateKeys(values)


def _problem(record: Any) -> Reason | None:
    """Why a parsed value is no row, level by level: recursion would end with the deepest ones."""
    level, has_duplicates = [record], False
    for _ in range(_MAX_DEPTH + 1):
        has_duplicates |= any(isinstance(value, _DuplicateKeys) for value in level)
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return Reason.DUPLICATE_KEY if has_duplicates else None
    return Reason.TOO_DEEP


def _read_array(path: str) -> Iterator[RawRow]:
    """Read the elements of a JSON array; a `.json` file may also contain JSON lines, or nothing."""
    with open_file(path) as file:
        content = file.read().removeprefix(_UTF8_BOM)
    if not content.strip():
        return
    try:
        array = _parsed(content)
    except (ValueError, RecursionError) as error:
        if content.lstrip()[:1] == b"{":
            yield from _read_lines(io.BytesIO(content), Split(path))
            return
        raise DataError([f"{path}: not a JSON array: {error}"]) from error
    for number, record in enumerate(array if isinstance(array, list) else [array]):
        yield _row(number, record)


def _read_table(path: str, delimiter: str) -> Iterator[RawRow]:
    """Read CSV or TSV with a header; row numbers are the lines that rows begin on."""
    csv.field_size_limit(sys.maxsize)
    with open_file(path) as raw:
        file = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header = next((cells for cells in reader if any(map(str.strip, cells))), [])
        if len(set(header)) < len(header):
            raise DataError([f"{path}: the header has a duplicate column: {', '.join(header)}"])
        number = reader.line_num
        try:
            for cells in reader:
                if len(cells) > 1 or any(map(str.strip, cells)):  # else a blank line
                    yield _table_row(number, header, cells)
                number = reader.line_num
        except csv.Error as error:
            raise DataError(
                [f"{path}:{reader.line_num}: cannot be read further: {error}"]
            ) from error


def _table_row(number: int, header: Sequence[str], cells: Sequence[str]) -> RawRow:
    text = ",".join(cells)
    excerpt = text[:800].encode(errors="replace").decode()
    try:
        text.encode()
    except UnicodeEncodeError:
        return RawRow(number, None, Reason.NOT_UTF8, excerpt)
    if len(cells) != len(header):
        return RawRow(number, None, Reason.MALFORMED_TABLE, excerpt)
    return RawRow(number, dict(zip(header, cells, strict=True)), excerpt=excerpt)
