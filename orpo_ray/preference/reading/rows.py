"""What is known of a row before it is understood: where it stands, and its record or why none."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orpo_ray.preference.records import Reason


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
