"""Reading columnar files (Parquet and Arrow) in record batches of bounded size.

Arrow trusts the offsets, lengths and indices of a file until it is asked to validate them, and
follows them out of its buffers. So nothing is converted that was not validated in full.
"""

import contextlib
import lzma
import sys
import zlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orpo_ray.preference.errors import DataError
from orpo_ray.preference.messages import without_nulls
from orpo_ray.preference.reading.rows import RawRow, Split
from orpo_ray.preference.reading.sources import open_file
from orpo_ray.preference.records import Reason

READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, MemoryError)
_BATCH_ROWS = 512
# Every split decodes its row group from the start, so a group is cut into a few splits only.
_SPLITS_PER_ROW_GROUP = 8
# A row of data takes a bit at least. A file may claim any number of rows that take none.
_MAX_ROWS_PER_BYTE = 8
_BYTES_OF = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
_BYTES_OF |= {pa.string_view(): pa.binary_view()}


def split_parquet(path: str, rows_per_split: int) -> list[Split]:
    """Cut a file into splits whose sizes are a multiple of `rows_per_split`.

    Raises:
        DataError: if the file cannot be opened.
    """
    with _parquet(path) as file:
        metadata = file.metadata
    groups = _group_rows(metadata)
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
            groups = _group_rows(opened_file.metadata)
        except (*READ_ERRORS, ValueError) as error:
            raise DataError([f"{path}: not a Parquet file, or a damaged one: {error}"]) from error
        if min(groups, default=0) < 0 or sum(groups) != opened_file.metadata.num_rows:
            raise DataError([f"{path}: a damaged Parquet file: its row groups do not add up"])
        yield opened_file


def _group_rows(metadata: Any) -> list[int]:
    return [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]


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
    """Yield rows `first` to `stop` (exclusive); the first batch begins with row `number`.

    Raises:
        pa.ArrowInvalid: for a batch that is damaged.
    """
    for batch in batches:
        if number >= stop:
            return
        if len(batch) > _MAX_ROWS_PER_BYTE * batch.get_total_buffer_size():
            raise pa.ArrowInvalid(f"{len(batch)} rows in {batch.get_total_buffer_size()} bytes")
        _validate(batch)
        begin, end = min(len(batch), max(0, first - number)), min(len(batch), stop - number)
        for start in range(begin, end, _BATCH_ROWS):
            part = batch.slice(start, min(_BATCH_ROWS, end - start))
            yield from _batch_rows(part, number + start)
        number += len(batch)


def _validate(batch: Any) -> None:
    """Check that nothing in a batch leads out of its buffers; texts may be no UTF-8.

    Raises:
        pa.ArrowInvalid: for a batch that is damaged.
    """
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error):
            raise
        # The first such text ended the validation, and what comes after it was not looked at.
        pa.record_batch(_TextsAsBytes(batch)).validate(full=True)


class _TextsAsBytes:
    """A batch under a schema that says bytes where its own says text, by Arrow's C interface."""

    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def __arrow_c_array__(self, requested_schema: Any = None) -> tuple[Any, Any]:
        fields = [field.with_type(_as_bytes(field.type)) for field in self._batch.schema]
        _, array = self._batch.__arrow_c_array__()
        return pa.schema(fields).__arrow_c_schema__(), array


def _as_bytes(kind: Any) -> Any:
    """The type with bytes for text; text in types that are not rows of JSON stays text."""

    def inner(field: Any) -> Any:
        return field.with_type(_as_bytes(field.type))

    if kind in _BYTES_OF:
        return _BYTES_OF[kind]
    if pa.types.is_list(kind):
        return pa.list_(inner(kind.value_field))
    if pa.types.is_large_list(kind):
        return pa.large_list(inner(kind.value_field))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(inner(kind.value_field), kind.list_size)
    if pa.types.is_struct(kind):
        return pa.struct([inner(kind.field(index)) for index in range(kind.num_fields)])
    if pa.types.is_map(kind):
        return pa.map_(inner(kind.key_field), inner(kind.item_field), kind.keys_sorted)
    return kind


def _batch_rows(batch: Any, number: int) -> Iterator[RawRow]:
    """Convert a batch; if that fails, convert row by row so that only the bad rows are lost."""
    try:
        records = _to_records(batch)
    except (ValueError, OverflowError, KeyError):
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
    except (ValueError, OverflowError, KeyError):
        return RawRow(number, None, Reason.WRONG_TYPE)


def _to_records(batch: Any) -> list[dict[str, Any]]:
    """The rows of a batch; maps are dicts, and fields that Arrow added to structs are left out.

    A column of structs has the fields of all rows; those that a row does not have are null in it.
    """
    records: list[dict[str, Any]] = batch.to_pylist(maps_as_pydicts="strict")
    nested = [field.name for field in batch.schema if pa.types.is_nested(field.type)]
    for record in records if nested else ():
        for name in nested:
            record[name] = without_nulls(record[name])
    return records
