"""Columns of more rows than there is memory for, on disk in parts that are read one at a time."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

PART_ROWS = 1 << 20
_MOST_PARTS = 128  # each has an open file


class Partitions:
    """Rows of unsigned 64-bit columns, by part; within a part they keep their order.

    A single part stays in memory. Files are deleted by the operating system when they are closed,
    be it by the end of the process.

    Args:
        n_rows: how many there will be, about.
        folder: on a disk with room for them.
    """

    def __init__(self, n_rows: int, folder: Path) -> None:
        wanted = max(1, -(-n_rows // PART_ROWS))
        self.bits = min((wanted - 1).bit_length(), _MOST_PARTS.bit_length() - 1)
        self.n_parts = 1 << self.bits
        self._files: list[IO[bytes]] = []
        self._rows: list[npt.NDArray[np.uint64]] = []
        if self.bits:
            for _ in range(self.n_parts):
                self._files.append(tempfile.TemporaryFile(dir=folder))  # noqa: SIM115, see close

    def of_hashes(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """A part for each hash, all of about the same number of them."""
        if not self.bits:
            return np.zeros(len(keys), np.int64)
        return (keys >> np.uint64(64 - self.bits)).astype(np.int64)

    def add(self, parts: npt.NDArray[np.int64], *columns: npt.NDArray[Any]) -> None:
        """Add rows, each to its part."""
        rows = np.stack([column.astype(np.uint64, copy=False) for column in columns], axis=1)
        if not self._files:
            self._rows.append(rows)
            return
        order = np.argsort(parts, kind="stable")
        ends = np.searchsorted(parts[order], np.arange(self.n_parts + 1)).tolist()
        rows = rows[order]
        for file, first, end in zip(self._files, ends[:-1], ends[1:], strict=True):
            if end > first:
                file.write(rows[first:end].tobytes())

    def read(self, n_columns: int) -> Iterator[list[npt.NDArray[np.uint64]]]:
        """The columns of each part, in the order of the parts."""
        if not self._files:
            yield list(np.concatenate([np.empty((0, n_columns), np.uint64), *self._rows]).T)
        for file in self._files:
            file.flush()
            file.seek(0)
            rows = np.frombuffer(file.read(), np.uint64).reshape(-1, n_columns)
            yield list(rows.T)

    def close(self) -> None:
        """Delete the files."""
        for file in self._files:
            file.close()
