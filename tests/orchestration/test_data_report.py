"""What a run directory says of its data."""

import json
from pathlib import Path
from typing import Any

import pytest

from orpo_ray.orchestration.data_report import write_data_report
from orpo_ray.preference.shards import TokenSet


def counts(read: int, kept: int, refused: int) -> dict[str, Any]:
    return {
        "rows_read": read,
        "rows_kept": kept,
        "rows_refused": refused,
        "refused": {"empty_chosen": refused} if refused else {},
        "truncated_pairs": 1,
    }


def token_set(folder: Path, total: dict[str, Any], *parts: dict[str, Any]) -> TokenSet:
    """A token set of files `0`, `1` ...; every one that refused rows has its quarantine."""
    quarantine = []
    (folder / "quarantine").mkdir(parents=True)
    for index, part in enumerate(parts):
        if part["rows_refused"]:
            quarantine.append(f"quarantine/{index}.jsonl")
            (folder / quarantine[-1]).write_text(f'{{"file": "{index}\u00e9"}}\n', encoding="utf-8")
    sources = {str(index): part for index, part in enumerate(parts)}
    report = total | {"sources": sources, "quarantine": quarantine}
    return TokenSet(str(folder), (), tuple(sources), report)


def test_counts_and_refused_rows_of_every_set(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    parts = (counts(5, 3, 2), counts(4, 4, 0), counts(2, 1, 1))
    train = token_set(tmp_path / "train", counts(11, 8, 3), *parts)
    evaluation = token_set(tmp_path / "eval", counts(4, 4, 0), counts(4, 4, 0))
    write_data_report(str(run), {"train": train, "eval": evaluation})

    report = json.loads((run / "data_report.json").read_text())
    assert list(report) == ["train", "eval"]
    assert report["train"] == counts(11, 8, 3) | {
        "sources": {str(index): part for index, part in enumerate(parts)}
    }
    assert report["eval"]["rows_kept"] == 4
    assert [path.name for path in (run / "quarantine").iterdir()] == ["train.jsonl"]
    lines = (run / "quarantine" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["file"] for line in lines] == ["0\u00e9", "2\u00e9"]


def test_a_run_that_goes_on_does_not_count_twice(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    tokens = token_set(tmp_path / "set", counts(2, 1, 1), counts(2, 1, 1))
    write_data_report(str(run), {"train": tokens})
    once = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    write_data_report(str(run), {"train": tokens})
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == once


def test_without_refused_rows_there_is_no_quarantine(tmp_path: Path) -> None:
    tokens = token_set(tmp_path / "set", counts(4, 4, 0), counts(4, 4, 0))
    write_data_report(str(tmp_path), {"train": tokens})
    assert not (tmp_path / "quarantine").exists()


@pytest.mark.parametrize(
    ("total", "part"),
    [(counts(5, 3, 1), counts(4, 3, 1)), (counts(4, 3, 1), counts(4, 3, 0))],
)
def test_rows_that_are_neither_kept_nor_refused_stop_the_run(
    tmp_path: Path, total: dict[str, Any], part: dict[str, Any]
) -> None:
    """One row too few in the sum of the set, or in that of one file."""
    tokens = token_set(tmp_path / "set", total, part)
    with pytest.raises(AssertionError, match=r"train: .* does not add up"):
        write_data_report(str(tmp_path), {"train": tokens})
    assert not (tmp_path / "data_report.json").exists()
