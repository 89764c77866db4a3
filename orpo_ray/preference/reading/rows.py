"""Splits of source files, and their rows as decoded but not yet validated."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orpo_ray.preference.records import Reason


@dataclass(frozen=True)
class Split:
    """A contiguous range of rows of one file, read by one data task.

    Args:
        path: absolute path or URL of the file.
        first_row: number of its first row, from 0: a line, array element or Parquet row.
        n_rows: number of rows, or None for the rest of the file.
        first_byte: offset of its first line; only for uncompressed JSON lines.
    """

    path: str
    first_row: int = 0
    n_rows: int | None = None
    first_byte: int = 0


@dataclass(frozen=True)
class RawRow:
    """One row of a file: the decoded record, or the reason why it could not be decoded.

    Args:
        number: row number in the file, from 0; for CSV and TSV, the line that it begins on.
        record: the decoded object.
        problem: set if and only if `record` is None.
        excerpt: beginning of the row's text, if known, for the quarantine.
    """

    number: int
    record: Mapping[str, Any] | None
    problem: Reason | None = None
    excerpt: str = ""
