"""Shards written again: prompts in one group, pairs held out, repeated, or of another set."""

import json
from dataclasses import replace
from pathlib import Path

from orpo_ray.dataset.ingest import ingest
from orpo_ray.dataset.regroup import load_keys
from orpo_ray.dataset.shards import TokenSet, read_shard
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
