"""The ledger and the margins as arrays are what JSON says."""

import json
from pathlib import Path

import numpy as np
import pytest

from orpo_ray.preference.groups import RowId
from orpo_ray.runs import ledger
from orpo_ray.runs.files import RunFiles
from orpo_ray.runs.ledger import read_ledger, read_margins
from orpo_ray.storage.folder import Folder


@pytest.mark.parametrize("block_bytes", [1 << 20, 1])
def test_blocks_hold_what_was_written(
    block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of no row, of some, and with skipped ones; in one block, and a line a block."""
    monkeypatch.setattr(ledger, "_BLOCK_BYTES", block_bytes)
    files = RunFiles(Folder.at(tmp_path), is_writer=True)
    steps = [
        ([], [RowId(1, 4)]),
        ([RowId(0, 0), RowId(12, 10**9)], []),
        ([RowId(2, 2)], [RowId(0, 1)]),
    ]
    for step, (rows, skipped) in enumerate(steps, start=9):
        files.ledger(step, 0, rows, skipped)
        files.margins(step, [-1.5e-7 * row.row for row in rows])
    blocks = list(read_ledger(tmp_path))
    assert len(blocks) == (1 if block_bytes > 1 else 3)
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert np.concatenate([b.steps for b in blocks]).tolist() == [line["step"] for line in lines]
    assert np.concatenate([b.sizes for b in blocks]).tolist() == [0, 2, 1]
    assert np.concatenate([b.rows for b in blocks]).tolist() == [
        row for line in lines for row in line["rows"]
    ]
    assert np.concatenate([b.skipped for b in blocks]).tolist() == [[1, 5], [0, 2]]
    margins = list(read_margins(tmp_path))
    assert np.concatenate([b.sizes for b in margins]).tolist() == [0, 2, 1]
    assert np.concatenate([b.margins for b in margins]).tolist() == [-0.0, -150.0, -3e-7]


def test_a_torn_last_line_and_no_file_are_nothing(tmp_path: Path) -> None:
    assert [*read_ledger(tmp_path), *read_margins(tmp_path)] == []
    (tmp_path / "ledger.jsonl").write_text('{"step":1,"epoch":0,"rows":[[0,1]]}\n{"step":2,"ep')
    (block,) = read_ledger(tmp_path)
    assert block.steps.tolist() == [1]
