"""Reading columnar files (Parquet and Arrow) in record batches of bounded size."""

import contextlib
import lzma
import sys
import zlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orpo_ray.preference.errors import DataError
from orpo_ray.preference.reading.rows import RawRow, Split
from orpo_ray.preference.reading.sources import open_file
from orpo_ray.preference.records import Reason

READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowInvalid)
_BATCH_ROWS = 512
# Every split decodes its row group from the start, so a group is cut into a few splits only.
_SPLITS_PER_ROW_GROUP = 8


def split_parquet(path: str, rows_per_split: int) -> list[Split]:
    """Cut a file into splits whose sizes are a multiple of `rows_per_split`.

    Raises:
        DataError: if the file cannot be opened.
    """
    with _parquet(path) as file:
        metadata = file.metadata
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    least = -(-max(groups, default=1) // _SPLITS_PER_ROW_GROUP)
    size = -(-max(least, rows_per_split) // rows_per_split) * rows_per_split
    firsts = range(0, metadata.num_rows, size)
    return [Split(path, first, min(size, metadata.num_rows - first)) for first in firsts]


def count_parquet(path: str) -> int:
    """Count the rows of a file, reading only its footer.

    Raises:
        DataError: if the file cannot be opened.
    """
    with _parquet(path) as file:
        return int(file.metadata.num_rows)


@contextlib.contextmanager
def _parquet(path: str) -> Iterator[Any]:
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open_file(path, seekable=True))
            opened_file = stack.enter_context(pq.ParquetFile(file))
        except READ_ERRORS as error:
            raise DataError([f"{path}: not a Parquet file, or a damaged one: {error}"]) from error
        yield opened_file


def read_parquet(split: Split) -> Iterator[RawRow]:
    """Read a split, decoding only the row groups that overlap it."""
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


def read_arrow(path: str) -> Iterator[RawRow]:
    """Read a file of Arrow's IPC stream format, as `datasets` writes it, or IPC file format."""
    with open_file(path) as file:
        start = file.read(6)
    if not start:  # an archive of nothing
        return
    if start == b"ARROW1":
        with open_file(path, seekable=True) as file:
            reader = pa.ipc.open_file(file)
            yield from _records(map(reader.get_batch, range(reader.num_record_batches)))
    else:
        with open_file(path) as file:
            yield from _records(pa.ipc.open_stream(file))


def _records(
    batches: Any, number: int = 0, first: int = 0, stop: int = sys.maxsize
) -> Iterator[RawRow]:
    """Yield rows `first` to `stop` (exclusive); the first batch begins with row `number`."""
    for batch in batches:
        if number >= stop:
            return
        begin, end = min(len(batch), max(0, first - number)), min(len(batch), stop - number)
        for start in range(begin, end, _BATCH_ROWS):
            part = batch.slice(start, min(_BATCH_ROWS, end - start))
            yield from _batch_rows(part, number + start)
        number += len(batch)


def _batch_rows(batch: Any, number: int) -> Iterator[RawRow]:
    """Convert a batch; if that fails, convert row by row so that only the bad rows are lost."""
    try:
        records = _to_records(batch)
    except (ValueError, OverflowError):
        for index in range(len(batch)):
            yield _one_row(batch.slice(index, 1), number + index)
        return
    for index, record in enumerate(records):
        yield RawRow(number + index, record)


def _one_row(batch: Any, number: int) -> RawRow:
    try:
        return RawRow(number, _to_records(batch)[0])
    except UnicodeDecodeError:
        return RawRow(number, None, Reason.NOT_UTF8)
    except (ValueError, OverflowError):
        return RawRow(number, None, Reason.WRONG_TYPE)


def _to_records(batch: Any) -> list[dict[str, Any]]:
    """The rows of a batch; maps are dicts, and fields that Arrow added to structs are left out.

    A column of structs has the fields of all rows; those that a row does not have are null in it.
    """
    records: list[dict[str, Any]] = batch.to_pylist(maps_as_pydicts="strict")
    nested = [field.name for field in batch.schema if pa.types.is_nested(field.type)]
    for record in records if nested else ():
        for name in nested:
            record[name] = _without_nulls(record[name])
    return records


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
