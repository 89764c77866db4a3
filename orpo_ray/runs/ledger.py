"""Reading `ledger.jsonl` and `margins.jsonl` as arrays, a block of steps at a time.

Parsed as JSON, a row would take some hundred bytes and a microsecond.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orpo_ray.runs.files import LEDGER, MARGINS

_BLOCK_BYTES = 4 << 20
_ROWS, _SKIPPED, _MARGINS = b'"rows":', b'"skipped":', b'"margins":'
Steps = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LedgerBlock:
    """Some steps of the ledger.

    Args:
        steps: their numbers.
        sizes: rows of each.
        rows: (rows, 2) of source file and row there from 1, of all of them.
        skipped: the same of rows that were left out.
    """

    steps: Steps
    sizes: Steps
    rows: npt.NDArray[np.int64]
    skipped: npt.NDArray[np.int64]


@dataclass(frozen=True)
class MarginBlock:
    """Some steps of the margins: their numbers, how many margins each has, and those."""

    steps: Steps
    sizes: Steps
    margins: npt.NDArray[np.float64]


def read_ledger(run_directory: Path) -> Iterator[LedgerBlock]:
    """The ledger of a run; nothing where there is none."""
    for lines in _blocks(run_directory / LEDGER):
        rows, skipped = [], []
        for line in lines:
            kept, _, left_out = line.partition(_SKIPPED)
            rows.append(kept.partition(_ROWS)[2])
            skipped.append(left_out)
        yield LedgerBlock(
            steps=_steps(lines),
            sizes=np.array([max(0, part.count(b"[") - 1) for part in rows], np.int64),
            rows=_numbers(rows, np.int64).reshape(-1, 2),
            skipped=_numbers(skipped, np.int64).reshape(-1, 2),
        )


def read_margins(run_directory: Path) -> Iterator[MarginBlock]:
    """The margins of a run; nothing where there are none."""
    for lines in _blocks(run_directory / MARGINS):
        parts = [_list(line.partition(_MARGINS)[2]) for line in lines]
        sizes = [part.count(b",") + 1 if part else 0 for part in parts]
        yield MarginBlock(_steps(lines), np.array(sizes, np.int64), _numbers(parts, np.float64))


def _blocks(path: Path) -> Iterator[list[bytes]]:
    """Whole lines, about four megabytes at a time; a torn last one is left out."""
    if path.exists():
        with path.open("rb") as file:
            while lines := file.readlines(_BLOCK_BYTES):
                yield [line for line in lines if line.endswith(b"\n")]


def _steps(lines: Sequence[bytes]) -> Steps:
    """The numbers after `{"step":`."""
    return np.array([int(line[line.index(b":") + 1 : line.index(b",")]) for line in lines])


def _list(text: bytes) -> bytes:
    """The numbers of a list of numbers or of lists of them, between commas."""
    return text.translate(None, b"[]{} \n").rstrip(b",")


def _numbers(parts: Sequence[bytes], kind: Any) -> npt.NDArray[Any]:
    text = b",".join(part for part in map(_list, parts) if part)
    return np.fromstring(text, kind, sep=",") if text else np.empty(0, kind)
