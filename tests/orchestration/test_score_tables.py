"""Scores of a finished evaluation as the baseline of another one."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orpo_ray.orchestration.evaluate import _statistics
from orpo_ray.orchestration.score_tables import (
    finished_evaluation,
    read_finished,
    why_not_comparable,
)
from orpo_ray.preference.errors import DataError
from orpo_ray.training.evaluation import SCHEMA


def table(keys: list[int], file: str = "/data/a.jsonl") -> pa.Table:
    """A pair a row, with its prompt's key."""
    columns = {"file": [file] * len(keys), "row": list(range(1, len(keys) + 1))}
    return pa.table(columns | {"prompt_key": pa.array(keys, pa.uint64())})


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """As `evaluate` leaves it, and then moved."""
    folder = tmp_path / "looked-at"
    folder.mkdir()
    pq.write_table(table([7, 8]), folder / "scores-hard.parquet")
    sets = {"hard": {"scores": "s3://bucket/runs/looked-at/scores-hard.parquet"}}
    (folder / "evaluation.json").write_text(json.dumps({"sets": sets}))
    return folder


def test_a_finished_evaluation_is_named_by_its_folder_or_its_file(finished: Path) -> None:
    assert finished_evaluation(str(finished)) == finished
    assert finished_evaluation(str(finished / "evaluation.json")) == finished
    assert finished_evaluation(str(finished / "scores-hard.parquet")) is None
    assert finished_evaluation("org/model") is None
    (finished / "config.json").write_text("{}")  # a model that was evaluated where it lies
    assert finished_evaluation(str(finished)) is None


def test_its_scores_are_found_beside_it(finished: Path) -> None:
    assert read_finished(finished) == {"hard": table([7, 8])}
    (finished / "scores-hard.parquet").unlink()
    with pytest.raises(DataError, match=r"baseline: .*looked-at: no evaluation with its scores"):
        read_finished(finished)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"sets": {"a": {}}}', '{"sets": {"a": {"scores": 1}}}']
)
def test_what_is_no_evaluation_is_refused(finished: Path, text: str) -> None:
    (finished / "evaluation.json").write_text(text)
    with pytest.raises(DataError, match="no evaluation with its scores"):
        read_finished(finished)


@pytest.mark.parametrize(
    ("baseline", "reason"),
    [
        (table([7, 8, 9]), None),
        (table([8]), None),  # one pair, of another tokenizer
        (table([1, 2, 3]), None),  # another tokenizer
        (table([7, 0, 9]), "1 of 3 rows have another prompt now; evaluate it again"),
        (table([7, 8, 9], "/data/b.jsonl"), "it has no row of these files"),
    ],
)
def test_rows_that_were_changed_since_are_not_compared(
    baseline: pa.Table, reason: str | None
) -> None:
    assert why_not_comparable(table([7, 8, 9]), baseline) == reason


def test_a_set_without_two_answers_has_no_figures_of_pairs():
    scores = SCHEMA.empty_table().append_column("subset", pa.array([], pa.string()))
    found = _statistics(scores, None, "scores.parquet")
    assert (found.pairs, found.subsets, found.lengths) == (0, {}, {})
    assert all(np.isnan(estimate.value) for estimate in found.figures.values())
