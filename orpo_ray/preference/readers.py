"""Reading the rows of files: JSON lines and arrays, tables of text, Parquet and Arrow."""

import contextlib
import csv
import io
import json
import lzma
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from orpo_ray.preference.errors import DataError
from orpo_ray.preference.records import Reason
from orpo_ray.preference.sources import (
    ARROW,
    LINES,
    PARQUET,
    STREAMED,
    TABLES,
    kind_of,
    opened,
)

_BLOCK_BYTES = 1 << 20
_BATCH_ROWS = 512
# A row group is decoded from its start by every split that lies in it.
_SPLITS_PER_ROW_GROUP = 8
_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Split:
    """A stretch of one file that a data task reads.

    Args:
        path: absolute path or URL of the file.
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
        number: 0-based row number in the file; of a table, its line there.
        record: the decoded object.
        problem: set when there is no record.
        excerpt: the row's text as far as it is known, for the quarantine.
    """

    number: int
    record: Mapping[str, Any] | None
    problem: Reason | None = None
    excerpt: str = ""


class _RepeatedKeyError(ValueError):
    """An object of JSON has a key twice, and each parser keeps another value."""


def split_file(path: str, rows_per_split: int) -> list[Split]:
    """Cut a file so that many tasks can read it; what is packed or an array stays whole.

    Raises:
        DataError: for a Parquet file that cannot be opened.
    """
    if path.endswith(PARQUET):
        with _parquet(path) as file:
            metadata = file.metadata
        groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        least = -(-max(groups, default=1) // _SPLITS_PER_ROW_GROUP)
        size = -(-max(least, rows_per_split) // rows_per_split) * rows_per_split
        firsts = range(0, metadata.num_rows, size)
        return [Split(path, first, min(size, metadata.num_rows - first)) for first in firsts]
    if path.endswith(LINES) and not path.startswith(STREAMED):
        return _split_lines(path, rows_per_split)
    return [Split(path)]


def _split_lines(path: str, rows_per_split: int) -> list[Split]:
    """Splits of `rows_per_split` lines, by looking for line ends only."""
    splits, start, row, offset = [], 0, 0, 0
    with opened(path) as file:
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
    """Rows in a file, blank lines included; nothing is checked that need not be."""
    if path.endswith(PARQUET):
        with _parquet(path) as file:
            return int(file.metadata.num_rows)
    if kind_of(path) not in LINES:
        return sum(1 for _ in read_split(Split(path)))
    n_lines, last = 0, b"\n"
    with opened(path) as file:
        while block := file.read(_BLOCK_BYTES):
            n_lines, last = n_lines + block.count(b"\n"), block[-1:]
    return n_lines + (last != b"\n")


def read_split(split: Split) -> Iterator[RawRow]:
    """The rows of a split in order; blank lines are passed over but numbered.

    Raises:
        DataError: for a file that cannot be read on: a torn archive, a damaged Parquet file, a
            JSON file that is no array.
    """
    kind = kind_of(split.path)
    try:
        if kind in PARQUET:
            yield from _read_parquet(split)
        elif kind in ARROW:
            yield from _read_arrow(split.path)
        elif kind in TABLES:
            yield from _read_table(split.path, "," if kind == ".csv" else "\t")
        elif kind in LINES:
            with opened(split.path) as file:
                yield from _read_lines(file, split)
        else:
            yield from _read_array(split.path)
    except (
        *(OSError, EOFError, UnicodeDecodeError),
        *(zlib.error, lzma.LZMAError, pa.ArrowInvalid, csv.Error),
    ) as error:
        raise DataError([f"{split.path}: cannot be read: {error}"]) from error


@contextlib.contextmanager
def _parquet(path: str) -> Iterator[Any]:
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(opened(path, seekable=True))
            opened_file = stack.enter_context(pq.ParquetFile(file))
        except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowInvalid) as error:
            raise DataError([f"{path}: not a Parquet file, or a damaged one: {error}"]) from error
        yield opened_file


def _read_lines(file: IO[bytes], split: Split) -> Iterator[RawRow]:
    if split.first_byte:
        file.seek(split.first_byte)
    for index, line in enumerate(file):
        if split.n_rows is not None and index >= split.n_rows:
            return
        if index == 0 and split.first_row == 0:
            line = line.removeprefix(_MARK)
        if line.strip():
            yield _decoded(split.first_row + index, line)


def _decoded(number: int, line: bytes) -> RawRow:
    """Parse one line; UTF-8 and JSON errors are the row's, not the file's."""
    excerpt = line[:800].decode(errors="replace").strip()
    try:
        record = _parsed(line)
    except UnicodeDecodeError:
        return RawRow(number, None, Reason.NOT_UTF8, excerpt)
    except _RepeatedKeyError:
        return RawRow(number, None, Reason.DUPLICATE_KEY, excerpt)
    except (ValueError, RecursionError):
        whole = line.endswith(b"\n")  # the last line of a file that was cut off has no end
        return RawRow(number, None, Reason.MALFORMED_JSON if whole else Reason.TORN_LINE, excerpt)
    return _row(number, record, excerpt)


def _parsed(content: bytes) -> Any:
    return json.loads(content.decode(), object_pairs_hook=_without_repeats)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise _RepeatedKeyError
    return values


def _row(number: int, record: Any, excerpt: str = "") -> RawRow:
    if not isinstance(record, dict):
        return RawRow(number, None, Reason.NOT_AN_OBJECT, excerpt or str(record)[:200])
    return RawRow(number, record, excerpt=excerpt)


def _read_array(path: str) -> Iterator[RawRow]:
    """The elements of a JSON array; a `.json` file that holds JSON lines is read as such."""
    with opened(path) as file:
        content = file.read().removeprefix(_MARK)
    try:
        array = json.loads(content.decode(), object_pairs_hook=_marking_repeats)
    except (ValueError, RecursionError) as error:
        if content.lstrip()[:1] == b"{":
            yield from _read_lines(io.BytesIO(content), Split(path))
            return
        raise DataError([f"{path}: not a JSON array: {error}"]) from error
    for number, record in enumerate(array if isinstance(array, list) else [array]):
        if _has_repeats(record):
            yield RawRow(number, None, Reason.DUPLICATE_KEY, str(record)[:200])
        else:
            yield _row(number, record)


class _Repeats(dict[str, Any]):
    """An object of JSON that had a key twice."""


def _marking_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    return values if len(values) == len(pairs) else _Repeats(values)


def _has_repeats(value: Any) -> bool:
    if isinstance(value, dict):
        return isinstance(value, _Repeats) or any(map(_has_repeats, value.values()))
    return isinstance(value, list) and any(map(_has_repeats, value))


def _read_table(path: str, delimiter: str) -> Iterator[RawRow]:
    """Rows of CSV with a header; numbered by the line on which they begin."""
    csv.field_size_limit(sys.maxsize)
    with opened(path) as raw:
        file = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError([f"{path}: its header names a column twice: {', '.join(header)}"])
        number = reader.line_num
        try:
            for cells in reader:
                if cells:
                    yield _table_row(number, header, cells)
                number = reader.line_num
        except csv.Error as error:
            raise DataError([f"{path}:{reader.line_num}: cannot be read on: {error}"]) from error


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


def _read_parquet(split: Split) -> Iterator[RawRow]:
    """Rows of a Parquet file, opening only the row groups that hold some of them."""
    number = 0
    with _parquet(split.path) as file:
        n_rows = file.metadata.num_rows
        stop = split.first_row + (n_rows if split.n_rows is None else split.n_rows)
        for group in range(file.num_row_groups):
            n_rows = file.metadata.row_group(group).num_rows
            if number + n_rows > split.first_row and number < stop:
                batches = file.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group])
                yield from _records(batches, number, split.first_row, stop)
            number += n_rows


def _read_arrow(path: str) -> Iterator[RawRow]:
    """Rows of Arrow's stream format, as `datasets` writes it, or of its file format."""
    with opened(path) as file:
        is_file_format = file.read(6) == b"ARROW1"
    if is_file_format:
        with opened(path, seekable=True) as file:
            reader = pa.ipc.open_file(file)
            yield from _records(map(reader.get_batch, range(reader.num_record_batches)))
    else:
        with opened(path) as file:
            yield from _records(pa.ipc.open_stream(file))


def _records(
    batches: Any, number: int = 0, first: int = 0, stop: int = sys.maxsize
) -> Iterator[RawRow]:
    """Rows `first` to `stop` of batches, the first of which begins with row `number`."""
    for batch in batches:
        if number >= stop:
            return
        begin, end = min(len(batch), max(0, first - number)), min(len(batch), stop - number)
        for start in range(begin, end, _BATCH_ROWS):
            part = batch.slice(start, min(_BATCH_ROWS, end - start))
            yield from _batch_rows(part, number + start)
        number += len(batch)


def _batch_rows(batch: Any, number: int) -> Iterator[RawRow]:
    """The rows of one batch; where it cannot be converted whole, each row by itself."""
    try:
        records = batch.to_pylist()
    except (ValueError, OverflowError):
        for index in range(len(batch)):
            yield _one_row(batch.slice(index, 1), number + index)
        return
    for index, record in enumerate(records):
        yield RawRow(number + index, record)


def _one_row(batch: Any, number: int) -> RawRow:
    try:
        return RawRow(number, batch.to_pylist()[0])
    except UnicodeDecodeError:
        return RawRow(number, None, Reason.NOT_UTF8)
    except (ValueError, OverflowError):
        return RawRow(number, None, Reason.WRONG_TYPE)
