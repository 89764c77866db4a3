"""Rows that look labelled the wrong way round, from margins that are written here."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from orpo_ray.preference.groups import RowId
from orpo_ray.runs import suspects as reporting
from orpo_ray.runs.files import RunFiles
from orpo_ray.runs.suspects import too_early_to_tell, write_suspects
from orpo_ray.storage import partitions
from orpo_ray.storage.folder import Folder


def write_run(run: Path, steps: list[dict[int, float]]) -> None:
    """A ledger and its margins, by the writer of the runs; a step is {row from 1: margin}."""
    files = RunFiles(Folder.at(run), is_writer=True)
    for step, margins in enumerate(steps, start=1):
        rows = [RowId(0, row - 1) for row in margins]
        files.ledger(step, 0, rows, ())
        files.margins(step, list(margins.values()))


def suspects(run: Path) -> list[dict]:
    path = write_suspects(run, ["pairs.jsonl"])
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_lowest_mean_comes_first(tmp_path):
    """All steps are near one another, so they count the same."""
    write_run(tmp_path, [{1: 1.0, 2: -2.0, 3: 3.0}, {1: 2.0, 2: 1.0, 3: 3.0}])
    found = suspects(tmp_path)
    assert [line["row"] for line in found] == [2, 1, 3]
    assert [line["margin_mean"] for line in found] == pytest.approx([-0.5, 1.5, 3.0])
    assert [line["margin_spread"] for line in found] == pytest.approx([1.5, 0.5, 0.0], abs=1e-6)
    assert {(line["file"], line["passes"]) for line in found} == {("pairs.jsonl", 2)}


def test_a_margin_counts_as_much_as_the_model_knew(tmp_path):
    """Row 1 is -1 early and +1 late, row 2 the other way round: unweighted, both would mean 0.

    In the first 100 steps half of the margins are positive, in the last nine of ten, so that
    weights are 0.01 ** 2 and 0.8 ** 2.
    """
    early = [dict.fromkeys((10, 11), 1.0) | dict.fromkeys((12, 13), -1.0) for _ in range(100)]
    late = [{20 + i: 1.0 for i in range(9)} | {30: -1.0} for _ in range(100)]
    early[40] |= {1: -1.0, 2: 1.0}
    late[60] |= {1: 1.0, 2: -1.0}
    write_run(tmp_path, early + late)
    found = {line["row"]: line["margin_mean"] for line in suspects(tmp_path)}
    assert found[2] < -0.99
    assert found[1] == pytest.approx(-found[2])
    assert math.isclose(found[30], -1.0)


def test_a_step_whose_margins_are_missing_is_passed_over(tmp_path):
    """As in a run that was begun by a version without them."""
    write_run(tmp_path, [{1: 1.0}, {1: -3.0}, {1: 2.0}])
    path = tmp_path / "margins.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[2])
    (line,) = suspects(tmp_path)
    assert (line["margin_mean"], line["passes"]) == (1.5, 2)


def test_rows_of_earlier_other_data_are_left_out(tmp_path):
    """As the ledger of a run holds them that went on with fewer files (resume_changed)."""
    files = RunFiles(Folder.at(tmp_path), is_writer=True)
    files.ledger(1, 0, [RowId(0, 0), RowId(1, 0)], ())
    files.margins(1, [0.5, -0.5])
    assert [(line["file"], line["row"]) for line in suspects(tmp_path)] == [("pairs.jsonl", 1)]


def test_a_run_without_margins_has_no_suspects(tmp_path):
    assert suspects(tmp_path) == []


def test_the_list_for_people_is_short_and_all_rows_are_in_a_table(tmp_path, monkeypatch):
    """200 rows of two files, three times each: in parts of 40 entries as at once."""
    monkeypatch.setattr(reporting, "_SHOWN_ROWS", 20)
    rng = np.random.default_rng(0)
    tables, lists = [], []
    margins = rng.normal(size=(3, 200)).round(3)
    files = RunFiles(Folder.at(tmp_path), is_writer=True)
    for step in range(60):
        rows = [step % 20 * 10 + i for i in range(10)]
        files.ledger(step + 1, 0, [RowId(row % 2, row // 2) for row in rows], ())
        files.margins(step + 1, margins[step // 20, rows].tolist())
    for part_rows in (10_000, 40):
        monkeypatch.setattr(partitions, "PART_ROWS", part_rows)
        path = write_suspects(tmp_path, ["a.jsonl", "b.jsonl"])
        lists.append(path.read_text())
        tables.append(pq.read_table(tmp_path / "suspects.parquet"))
    assert lists[0] == lists[1]
    assert tables[0].equals(tables[1].combine_chunks()) or tables[0].to_pylist() == (
        tables[1].to_pylist()
    )
    every = tables[0].to_pylist()
    places = [(row["file"], row["row"]) for row in every]
    assert places == [(file, row) for file in ("a.jsonl", "b.jsonl") for row in range(1, 101)]
    assert {row["passes"] for row in every} == {3}
    worst = sorted(every, key=lambda row: row["margin_mean"])[:20]
    shown = [json.loads(line) for line in lists[0].splitlines()]
    assert [(row["file"], row["row"]) for row in shown] == [(r["file"], r["row"]) for r in worst]
    # Of row 7 of the second file, whose number among all is 13, by hand.
    (row,) = [row for row in every if (row["file"], row["row"]) == ("b.jsonl", 7)]
    right = np.array([(margins[step // 20, step % 20 * 10 :][:10] > 0).sum() for step in range(60)])
    near = [slice(max(0, step - 25), step + 26) for step in (1, 21, 41)]
    weights = [max(2 * right[part].mean() / 10 - 1, 0.01) ** 2 for part in near]
    assert row["margin_mean"] == pytest.approx(np.average(margins[:, 13], weights=weights))


def margins(n_right: int, n: int) -> list[float]:
    """That many of `n` margins positive, evenly spread."""
    return [1.0 if i * n_right // n < (i + 1) * n_right // n else -1.0 for i in range(n)]


@pytest.mark.parametrize(
    ("epoch", "n_right", "low", "is_early"),
    [
        (0.03, 50, None, True),
        (1.99, 50, 0.497, True),
        (2.0, 50, None, False),
        (0.03, 50, 0.503, False),
        # Of 100 pairs 0.6 has an interval from 0.502 (0.600 +- 0.096, drawn to the middle).
        (0.03, 59, None, True),
        (0.03, 60, None, False),
    ],
)
def test_no_label_is_called_wrong_before_the_model_tells_answers_apart(
    tmp_path, epoch, n_right, low, is_early
):
    """By two passes, a held-out accuracy, or that of the last half of the trained pairs."""
    files = RunFiles(Folder.at(tmp_path), is_writer=True)
    for step, part in enumerate([margins(0, 100), margins(n_right, 100)], start=1):
        files.margins(step, part)
    files.metrics({"step": 2, "epoch": epoch, "loss": 1.0, "eval_rewards/accuracies": 0.55})
    if low is not None:
        files.evaluation(2, "eval_", 97, {"accuracy": (0.55, low, 0.6)})
    reason = too_early_to_tell(tmp_path)
    assert (reason is not None) == is_early
    if reason:
        assert reason.startswith(f"{epoch} passes over the data, of 2 that it takes")


def test_a_run_of_no_step_is_too_early(tmp_path):
    assert too_early_to_tell(tmp_path) is not None
