"""Repeats and contradictions, found in parts, are those that a dictionary finds."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from orpo_ray.dataset.duplicates import find_repeats
from orpo_ray.dataset.ingest import ingest
from orpo_ray.storage import partitions
from tests.reference.ingest import file_bytes, map_tasks, request_of, text_row, write_rows


def naive(pairs: np.ndarray, swapped: np.ndarray) -> tuple[list[bool], list[bool]]:
    seen: set[int] = set()
    repeated = []
    for key in pairs.tolist():
        repeated.append(key in seen)
        seen.add(key)
    return repeated, [key in seen for key in swapped.tolist()]


@pytest.mark.parametrize("part_rows", [10_000, 200])
def test_repeats_and_contradictions_are_those_of_a_dictionary(
    part_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2,000 pairs of 900 keys, over all of the 64 bits, in pieces of 170."""
    monkeypatch.setattr(partitions, "PART_ROWS", part_rows)
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 2**64, 1800, np.uint64)
    pairs, swapped = keys[rng.integers(0, 900, 2000)], keys[rng.integers(0, 1800, 2000)]
    pieces = [(pairs[i : i + 170], swapped[i : i + 170]) for i in range(0, 2000, 170)]
    found = find_repeats(iter(pieces), 2000, tmp_path)
    assert [marks.tolist() for marks in found] == list(naive(pairs, swapped))


@pytest.mark.parametrize(
    "changes",
    [{"group_by_prompt": True}, {"group_by_prompt": True, "drop_duplicates": True}],
    ids=["grouped", "without repeats"],
)
def test_a_set_planned_in_parts_has_the_bytes_of_one_planned_at_once(
    changes: dict, tokenizer_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [text_row(i) | {"prompt": f"p{i * 7 % 31}: "} for i in range(200)]
    files = (write_rows(tmp_path / "a.jsonl", rows), write_rows(tmp_path / "b.jsonl", rows[50:]))
    request = request_of(
        files, tokenizer_folder, tmp_path / "one", shard_rows=4, val_set_size=0.2, **changes
    )
    sets = [ingest(request, map_tasks)]
    monkeypatch.setattr(partitions, "PART_ROWS", 16)
    sets.append(ingest(replace(request, cache_directory=str(tmp_path / "two")), map_tasks))
    one, two = (file_bytes(tokens.folder.path) for tokens in sets)
    del one["manifest.json"], two["manifest.json"]
    assert one == two
    assert not any("plans" in name for name in one)


def test_only_files_with_a_dropped_pair_are_written_again(
    tokenizer_folder: str, tmp_path: Path
) -> None:
    """60 rows in 10 shards, of which the last row of all repeats the first."""
    rows = [text_row(i) for i in range(59)] + [text_row(0)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    request = request_of((path,), tokenizer_folder, tmp_path, shard_rows=6, drop_duplicates=True)
    written: list[int] = []

    def tasks(items: list, work: object) -> list:
        written.append(len(items))
        return map_tasks(items, work)

    tokens = ingest(request, tasks)
    assert written[-1] == 1
    assert [shard.n_groups for shard in tokens.shards] == [6] * 9 + [5]
    assert [shard.name for shard in tokens.shards[:2]] == [
        "00000-0000000000.parquet",
        "00000-0000000006.parquet",
    ]
    assert len(list(tokens.folder.path.glob("*.parquet"))) == 10
