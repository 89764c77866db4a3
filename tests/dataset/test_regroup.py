"""Shards written again: prompts in one group, pairs held out, repeated, or of another set."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from orpo_ray.dataset.ingest import held_out_set, ingest, nothing_usable
from orpo_ray.dataset.pair_index import are_among, load_keys
from orpo_ray.dataset.shards import TokenSet, read_shard
from orpo_ray.preference.errors import DataError
from orpo_ray.preference.groups import RowId
from tests.reference.ingest import (
    LONG,
    groups_of,
    map_tasks,
    request_of,
    text_row,
    write_rows,
)


def test_pairs_of_one_prompt_become_one_group_wherever_they_stand(
    tokenizer_folder: str, tmp_path: Path
) -> None:
    """Prompts 0, 1 and 2 in turn over two files and several shards; three answers of each.

    As apart: 14 pairs of a prompt and two answers; together: 3 prompts and their distinct answers.
    """
    answers = [("yes", "no"), ("yesyes", "no"), ("yesyes", "yes")]
    rows = [
        {
            "prompt": f"p{i % 3}: ",
            "chosen": answers[i // 3 % 3][0],
            "rejected": answers[i // 3 % 3][1],
        }
        for i in range(14)
    ]
    for name, part in (("a.jsonl", rows[:8]), ("b.jsonl", rows[8:])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    request = request_of(
        (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")),
        tokenizer_folder,
        tmp_path,
        shard_rows=2,
    )
    apart = groups_of(ingest(request, map_tasks))
    tokens = ingest(replace(request, group_by_prompt=True), map_tasks)
    together = groups_of(tokens)
    assert [len(group.pairs) for group in together] == [5, 5, 4]
    assert [len(group.completions) for group in together] == [3, 3, 3]
    assert [shard.n_groups for shard in tokens.shards] == [2, 1]
    found = {
        row_id: (group.prompt.tolist(), *(group.completions[side].tolist() for side in pair))
        for group in together
        for row_id, pair in zip(group.row_ids, group.pairs, strict=True)
    }
    expected = {
        group.row_ids[0]: (group.prompt.tolist(), *(c.tolist() for c in group.completions))
        for group in apart
    }
    assert found == expected
    assert [group.row_ids[0] for group in together] == [RowId(0, 0), RowId(0, 1), RowId(0, 2)]
    assert tokens.report["rows_kept"] == tokens.n_pairs == 14
    assert tokens.report["prompts"] == 3
    assert {path.name for path in tokens.folder.path.glob("*.parquet")} == {
        shard.name for shard in tokens.shards
    }


def prompts(tokens: TokenSet, held: bool = False) -> list[str]:
    """The prompt of every pair of a set, in the order of the shards."""
    shards = tokens.held_out if held else tokens.shards
    groups = [group for s in shards for group in read_shard(f"{tokens.folder.path}/{s.name}")]
    return [bytes(group.prompt.tobytes()).hex() for group in groups for _ in group.pairs]


def test_a_held_out_share_is_split_by_prompt(tokenizer_folder: str, tmp_path: Path) -> None:
    """40 prompts of 3 pairs each: no prompt is on both sides, and every pair is on one."""
    rows = [text_row(i % 3) | {"prompt": f"p{i % 40}: "} for i in range(120)]
    request = request_of(
        (write_rows(tmp_path / "a.jsonl", rows),),
        tokenizer_folder,
        tmp_path,
        shard_rows=7,
        val_set_size=0.3,
    )
    for grouped in (False, True):
        tokens = ingest(replace(request, group_by_prompt=grouped), map_tasks)
        trained, held = prompts(tokens), prompts(tokens, held=True)
        assert len(trained) + len(held) == 120
        assert not set(trained) & set(held)
        assert 3 <= len(set(held)) <= 21  # of 40 with a share of 0.3, by a hash
        report = tokens.report
        assert (report["rows_kept"], report["rows_held_out"]) == (len(trained), len(held))
        assert report["rows_read"] == 120 == report["rows_kept"] + report["rows_held_out"]
        assert report["tokens"] == sum(shard.n_tokens for shard in tokens.shards)
    again = ingest(replace(request, shard_rows=50), map_tasks)
    assert set(prompts(again, held=True)) == set(held)


def test_repeated_pairs_are_counted_and_dropped_where_asked(
    tokenizer_folder: str, tmp_path: Path
) -> None:
    """Rows 0 to 9, then 5 to 9 once more in another file: the repeats are the later ones."""
    rows = [text_row(i) for i in range(10)]
    files = (write_rows(tmp_path / "a.jsonl", rows), write_rows(tmp_path / "b.jsonl", rows[5:]))
    request = request_of(files, tokenizer_folder, tmp_path, shard_rows=4)
    kept = ingest(request, map_tasks)
    assert (kept.n_pairs, kept.report["duplicate_pairs"]) == (15, 5)
    dropped = ingest(replace(request, drop_duplicates=True), map_tasks)
    assert (dropped.n_pairs, dropped.report["duplicate_pairs"]) == (10, 5)
    assert dropped.report["refused"] == {"duplicate": 5}
    parts = dropped.report["sources"].values()
    assert [(part["rows_kept"], part["rows_refused"]) for part in parts] == [(10, 0), (0, 5)]
    groups = groups_of(dropped)
    assert [group.row_ids[0] for group in groups] == [RowId(0, i) for i in range(10)]
    assert {shard.source for shard in dropped.shards} == {0}
    assert dropped.report["tokens"] == sum(group.n_tokens for group in groups)


def test_prompts_of_another_set_are_dropped_where_asked(
    tokenizer_folder: str, tmp_path: Path
) -> None:
    """Also where the answers differ; rows without a prompt share none."""
    rows = [text_row(i) for i in range(6)] + [text_row(6) | {"prompt": ""}]
    others = [text_row(2) | {"chosen": "other"}, text_row(4), text_row(7) | {"prompt": ""}]
    request = request_of(
        (write_rows(tmp_path / "eval.jsonl", others),), tokenizer_folder, tmp_path, shard_rows=4
    )
    evals = ingest(request, map_tasks)
    train = replace(request, files=(write_rows(tmp_path / "train.jsonl", rows),))
    tokens = ingest(replace(train, other_sets=(evals.folder,)), map_tasks)
    groups = groups_of(tokens)
    assert [group.row_ids[0].row for group in groups] == [0, 1, 3, 5, 6]
    assert tokens.report["refused"] == {"overlap": 2}
    assert ingest(train, map_tasks).n_pairs == 7


def test_a_ranking_is_one_row_of_several_pairs(tokenizer_folder: str, tmp_path: Path) -> None:
    """4 answers, 6 pairs; two of the answers are cut to the same tokens, which leaves 5."""
    answers = ["yes", "no", LONG + "a", LONG + "b"]
    row = {"prompt": "p: ", "completions": answers, "scores": [4, 3, 2, 1]}
    request = request_of(
        (write_rows(tmp_path / "a.jsonl", [row, text_row(1)]),),
        tokenizer_folder,
        tmp_path,
        shard_rows=4,
    )
    for grouped, n_groups in ((False, 6), (True, 2)):
        tokens = ingest(replace(request, group_by_prompt=grouped), map_tasks)
        assert (tokens.n_pairs, tokens.n_groups) == (6, n_groups)
        assert (tokens.report["rows_read"], tokens.report["rows_kept"]) == (2, 2)
        assert tokens.report["pairs_left_out"] == 1


def test_a_ranking_without_a_prompt_is_on_one_side_only(
    tokenizer_folder: str, tmp_path: Path
) -> None:
    rows = [
        {"prompt": "", "completions": [f"a{i}", f"b{i}", f"c{i}"], "scores": [1, 2, 3]}
        for i in range(30)
    ]
    tokens = ingest(
        request_of(
            (write_rows(tmp_path / "a.jsonl", rows),),
            tokenizer_folder,
            tmp_path,
            shard_rows=8,
            val_set_size=0.3,
        ),
        map_tasks,
    )
    report = tokens.report
    assert report["rows_read"] == report["rows_kept"] + report["rows_held_out"] == 30
    assert report["rows_held_out"] > 0


def test_held_out_repeats_are_dropped_too_and_half_written_stats_do_not_matter(
    tokenizer_folder: str, tmp_path: Path
) -> None:
    rows = [text_row(i % 3) | {"prompt": f"p{i % 40}: "} for i in range(40)] * 3
    tokens = ingest(
        request_of(
            (write_rows(tmp_path / "a.jsonl", rows),),
            tokenizer_folder,
            tmp_path,
            shard_rows=7,
            val_set_size=0.3,
            drop_duplicates=True,
        ),
        map_tasks,
    )
    held = sum(shard.n_pairs for shard in tokens.held_out)
    assert (tokens.n_pairs, held) == (tokens.report["rows_kept"], tokens.report["rows_held_out"])
    assert tokens.n_pairs + held == 40
    assert tokens.report["refused"] == {"duplicate": 80}
    (tokens.folder.path / "stats" / "00000-0000000000.77.tmp").touch()
    assert len(load_keys(tokens.folder, "pair_keys")) == 120


def test_pairs_that_contradict_another_one_are_counted_and_kept(
    tokenizer_folder: str, tmp_path: Path
) -> None:
    """Over shards and files; each of both sides counts, repeats too, and a ranking's own pairs.

    p0: yes over no twice, no over yes once: 3. p1: the other prompt has the other order: none. A
    ranking of yes, no and yes again: yes over no, no over yes: 2 (yes over yes is no pair).
    """
    first, other = {"chosen": "yes", "rejected": "no"}, {"chosen": "no", "rejected": "yes"}
    rows = [{"prompt": "p0: "} | first, {"prompt": "p1: "} | first, {"prompt": "p0: "} | first]
    more = [{"prompt": "p2: "} | other, {"prompt": "p0: "} | other]
    more += [{"prompt": "p3: ", "completions": ["yes", "no", "yes"], "scores": [3, 2, 1]}]
    files = (write_rows(tmp_path / "a.jsonl", rows), write_rows(tmp_path / "b.jsonl", more))
    request = request_of(files, tokenizer_folder, tmp_path, shard_rows=2)
    for changes in ({}, {"group_by_prompt": True}, {"drop_duplicates": True}):
        report = ingest(replace(request, **changes), map_tasks).report
        assert report["contradicting_pairs"] == 5
        assert [part["contradicting_pairs"] for part in report["sources"].values()] == [2, 3]
        assert report["duplicate_pairs"] == 1
        assert report["pairs"] == 7 - ("drop_duplicates" in changes)


def test_moving_text_from_one_answer_to_the_other_is_no_contradiction(
    tokenizer_folder: str, tmp_path: Path
) -> None:
    rows = [
        {"prompt": "p: ", "chosen": "yes", "rejected": "noyes"},
        {"prompt": "p: ", "chosen": "yesno", "rejected": "yes"},
        {"prompt": "p: yes", "chosen": "no", "rejected": "yes"},
    ]
    request = request_of((write_rows(tmp_path / "a.jsonl", rows),), tokenizer_folder, tmp_path)
    assert ingest(request, map_tasks).report["contradicting_pairs"] == 0


def test_keys_are_found_among_ordered_ones() -> None:
    keys = np.array([0, 5, 7, 2**64 - 1], np.uint64)
    for ordered in ([], [5], [0, 6, 2**64 - 1], [8]):
        expected = [int(key) in ordered for key in keys]
        assert are_among(keys, np.array(ordered, np.uint64)).tolist() == expected


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_one_prompt_cannot_be_divided(tokenizer_folder: str, tmp_path: Path, share: float) -> None:
    rows = [text_row(1) | {"chosen": f"yes{i}"} for i in range(9)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    request = request_of((path,), tokenizer_folder, tmp_path, val_set_size=share)
    with pytest.raises(DataError, match=r"all 9 pairs have one prompt, and .* held out whole"):
        held_out_set(ingest(request, map_tasks), share)


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (1e-9, "none of the 3 prompts would be held out.*: raise it from 1e-09, or name eval_fil"),
        (1 - 1e-9, "all of the 3 prompts would be held out.*: lower it from"),
    ],
)
def test_a_share_that_leaves_one_side_empty_says_how_many_prompts_there_are(
    tokenizer_folder: str, tmp_path: Path, share: float, message: str
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [text_row(i % 3) for i in range(6)])
    request = request_of((path,), tokenizer_folder, tmp_path, val_set_size=share)
    with pytest.raises(DataError, match=message):
        held_out_set(ingest(request, map_tasks), share)


def test_pairs_that_are_held_out_are_a_set_that_says_so(
    tokenizer_folder: str, tmp_path: Path
) -> None:
    """Of no pairs at all there is nothing to divide: that rows are refused is said elsewhere."""
    path = write_rows(tmp_path / "a.jsonl", [text_row(i) for i in range(20)])
    request = request_of((path,), tokenizer_folder, tmp_path, val_set_size=0.5)
    train = ingest(request, map_tasks)
    held = held_out_set(train, 0.5)
    assert (train.is_held_out, held.is_held_out) == (False, True)
    assert held.shards == train.held_out
    empty = write_rows(tmp_path / "b.jsonl", [{"prompt": "p"}])
    nothing = ingest(replace(request, files=(empty,)), map_tasks)
    assert held_out_set(nothing, 0.5).n_pairs == 0


def test_dropping_the_overlap_with_the_same_file_leaves_nothing_and_says_why(
    tokenizer_folder: str, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [text_row(i) for i in range(20)])
    request = request_of((path,), tokenizer_folder, tmp_path)
    evals = ingest(request, map_tasks)
    assert nothing_usable(evals) == []
    for share in (0.0, 0.5):
        again = replace(request, other_sets=(evals.folder,), val_set_size=share)
        first, *_ = nothing_usable(ingest(again, map_tasks))
        assert "overlap; drop_overlap leaves out all prompts of the evaluation sets" in first
        assert ("held out" in first) == bool(share)
