"""Columns on disk: every row comes back once, in its part, in order."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from orpo_ray.storage import partitions
from orpo_ray.storage.partitions import Partitions


@pytest.mark.parametrize("part_rows", [10_000, 300])
def test_rows_come_back_in_order_in_their_parts(
    part_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,000 random hashes, in memory or in 4 files (of 300 rows at most, to a power of two)."""
    monkeypatch.setattr(partitions, "PART_ROWS", part_rows)
    keys = np.random.default_rng(0).integers(0, 2**64, 1000, np.uint64)
    numbers = np.arange(1000)
    with closing(Partitions(1000, tmp_path)) as rows:
        assert rows.n_parts == (1 if part_rows > 1000 else 4)
        for first in range(0, 1000, 70):
            some = slice(first, first + 70)
            rows.add(rows.of_hashes(keys[some]), keys[some], numbers[some])
        for _ in range(2):  # also a second time
            parts = list(rows.read(2))
            assert len(parts) == rows.n_parts
            for index, (found, order) in enumerate(parts):
                assert (np.diff(order.astype(np.int64)) > 0).all()
                assert np.array_equal(found, keys[order])
                assert set(rows.of_hashes(found).tolist()) <= {index}
            assert sorted(np.concatenate([order for _, order in parts]).tolist()) == [*range(1000)]
    assert list(tmp_path.iterdir()) == []  # none of the files has a name


def test_many_rows_are_in_no_more_parts_than_files_may_be_open(tmp_path: Path) -> None:
    with closing(Partitions(10**10, tmp_path)) as rows:
        assert rows.n_parts == 128
