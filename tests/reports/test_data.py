"""What a run directory says of its data."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.dataset.ingest import LENGTHS
from orpo_ray.dataset.pair_index import PairStatsBuilder
from orpo_ray.dataset.shards import Shard, TokenSet, write_shard
from orpo_ray.preference.errors import DataError
from orpo_ray.preference.groups import PromptGroup, RowId
from orpo_ray.preference.templates import PairText
from orpo_ray.reports import data
from orpo_ray.reports.data import (
    count_trained,
    data_lines,
    refuse_bad_data,
    write_data_report,
)
from orpo_ray.reports.data_page import constant_prompt_line
from orpo_ray.storage.folder import Folder

CONFIG = ORPOConfig(per_device_train_batch_size=2, max_bad_fraction=0.3)


PAIRS = [(3, 2, 4), (10, 5, 1), (3, 6, 2)]


def counts(read: int, kept: int, refused: int) -> dict[str, Any]:
    return {
        "rows_read": read,
        "rows_kept": kept,
        "rows_refused": refused,
        "rows_held_out": 0,
        "refused": {"empty_chosen": refused} if refused else {},
        "truncated_pairs": 1,
    }


def token_set(folder: Path, total: dict[str, Any], *parts: dict[str, Any]) -> TokenSet:
    """A token set of files `0`, `1` ...; every one that refused rows has its quarantine.

    Its pairs are those of `PAIRS`, of which the first and the last share a prompt.
    """
    quarantine = []
    (folder / "quarantine").mkdir(parents=True)
    for index, part in enumerate(parts):
        if part["rows_refused"]:
            quarantine.append(f"quarantine/{index}.jsonl")
            (folder / quarantine[-1]).write_text(f'{{"file": "{index}\u00e9"}}\n', encoding="utf-8")
    (folder / "stats").mkdir()
    stats = PairStatsBuilder(held_share=0.0)
    tallies = {kind: np.zeros(40, np.int64) for kind in ("prompt", "chosen", "rejected", "longest")}
    for n_prompt, n_chosen, n_rejected in PAIRS:
        parts_of = [np.zeros(n, np.int32) for n in (n_prompt, n_chosen, n_rejected)]
        row_id = RowId(0, len(stats.groups))
        group = PromptGroup(parts_of[0], (parts_of[1], parts_of[2]), ((0, 1),), (row_id,))
        text = PairText("p" * n_prompt, "c" * n_chosen, "r" * n_rejected)
        stats.add(group, text, text.prompt)
        longest = n_prompt + max(n_chosen, n_rejected)
        for kind, n in zip(tallies, (n_prompt, n_chosen, n_rejected, longest), strict=True):
            tallies[kind][n] += 1
    stats.arrays().save(Folder.at(folder), "00000-0000000000")
    np.savez(folder / LENGTHS, **tallies)
    sources = {str(index): part for index, part in enumerate(parts)}
    report = total | {"sources": sources, "quarantine": quarantine}
    shard = Shard("0.parquet", total["rows_kept"], total["rows_kept"], 99, "digest", 0)
    return TokenSet(Folder.at(folder), (shard,), tuple(sources), report)


def test_counts_and_refused_rows_of_every_set(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    parts = (counts(5, 3, 2), counts(4, 4, 0), counts(2, 1, 1))
    train = token_set(tmp_path / "train", counts(11, 8, 3), *parts)
    evaluation = token_set(tmp_path / "eval", counts(4, 4, 0), counts(4, 4, 0))
    write_data_report(run, {"train": train, "eval_": evaluation}, CONFIG, {"0": "first"})

    report = json.loads((run / "data_report.json").read_text())
    assert list(report) == ["train", "eval"]
    sources = {str(index): part for index, part in enumerate(parts)}
    sources["0"] = {"name": "first"} | sources["0"]
    expected = counts(11, 8, 3) | {"sources": sources, "overlapping_pairs": 3}
    assert {name: report["train"][name] for name in expected} == expected
    assert report["eval"]["rows_kept"] == 4
    assert [path.name for path in (run / "quarantine").iterdir()] == ["train.jsonl"]
    lines = (run / "quarantine" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["file"] for line in lines] == ["0\u00e9", "2\u00e9"]


def test_the_same_files_for_training_and_evaluation_are_an_overlap(tmp_path: Path) -> None:
    """Both sets have one folder then, as have those that `val_set_size` holds out."""
    tokens = token_set(tmp_path / "set", counts(3, 3, 0), counts(3, 3, 0))
    held_out = replace(tokens, is_held_out=True)
    sets = {"train": tokens, "eval_": tokens, "eval_x_": tokens, "eval_held_out_": held_out}
    report = write_data_report(tmp_path, sets, CONFIG, {})
    assert [report[name].get("rows_read") for name in report] == [3, 3, 3, None]
    assert report["train"]["overlapping_pairs"] == 3
    report = write_data_report(tmp_path, {"train": tokens, "eval_": held_out}, CONFIG, {})
    assert report["train"]["overlapping_pairs"] == 0
    assert data_lines("eval", report["eval"]) == [
        "eval data: 0 rows held out of the training files"
    ]


def test_files_that_were_passed_over_are_in_the_report_and_said(tmp_path: Path) -> None:
    """Also those that turn out to have no row."""
    tokens = token_set(tmp_path / "set", counts(3, 3, 0), counts(3, 3, 0), counts(0, 0, 0))
    passed_over = {"train": {"hidden": (4, (".a", "_b/", ".c", ".d")), "empty": (1, ("e.csv",))}}
    written = write_data_report(tmp_path, {"train": tokens}, CONFIG, {}, passed_over)["train"]
    assert json.loads((tmp_path / "data_report.json").read_text())["train"]["passed_over"] == {
        "hidden": {"files": 4, "first": [".a", "_b/", ".c", ".d"]},
        "empty": {"files": 2, "first": ["e.csv", "1"]},
    }
    notes = dict.fromkeys(("truncated_prompts", "truncated_completions", "pairs_left_out"), 0)
    figures = written | notes | {"duplicate_pairs": 0, "shapes": {}, "ignored_columns": []}
    assert data_lines("train", figures)[-1] == (
        "train data: passed over: 4 hidden (.a, _b/, .c, ...), 2 empty (e.csv, 1)"
    )


def test_a_run_that_goes_on_does_not_count_twice(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    tokens = token_set(tmp_path / "set", counts(2, 1, 1), counts(2, 1, 1))
    write_data_report(run, {"train": tokens}, CONFIG, {})
    once = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    write_data_report(run, {"train": tokens}, CONFIG, {})
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == once


def test_of_many_refused_rows_people_get_some_and_all_are_in_a_table(tmp_path, monkeypatch) -> None:
    """Some of every reason, however late the first one with it comes."""
    monkeypatch.setattr(data, "_LISTED_ROWS", 4)
    tokens = token_set(tmp_path / "set", counts(20, 9, 11), counts(20, 9, 11))
    common, rare = ("empty_chosen", "the chosen answer is empty"), ("bad_json", "é")
    rows = [
        {"file": "f", "row": n, "reason": why[0], "detail": why[1], "excerpt": "half: \ud83d"}
        for n, why in enumerate([common] * 9 + [rare] * 2, start=1)
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "set/quarantine/0.jsonl").write_bytes(text.encode(errors="backslashreplace"))
    write_data_report(tmp_path, {"train": tokens}, CONFIG, {})
    listed = (tmp_path / "quarantine" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["row"] for line in listed] == [1, 2, 3, 4, 10, 11]
    table = pq.read_table(tmp_path / "quarantine" / "train.parquet").to_pylist()
    assert table == [row | {"excerpt": r"half: \ud83d"} for row in rows]


def test_without_refused_rows_there_is_no_quarantine(tmp_path: Path) -> None:
    tokens = token_set(tmp_path / "set", counts(4, 4, 0), counts(4, 4, 0))
    write_data_report(tmp_path, {"train": tokens}, CONFIG, {})
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
        write_data_report(tmp_path, {"train": tokens}, CONFIG, {})
    assert not (tmp_path / "data_report.json").exists()


def test_lengths_and_what_padding_would_cost(tmp_path: Path) -> None:
    """Sides of 7, 15 and 9 tokens, in batches of two.

    Two drawn independently are at most 7 with 1/9, at most 9 with 4/9, so E[max] = (7 x 1 + 9 x 3 +
    15 x 5) / 9 = 109/9, and six rows of it are 72.67 tokens.
    """
    tokens = token_set(tmp_path / "set", counts(3, 3, 0), counts(3, 3, 0))
    figures = write_data_report(tmp_path, {"train": tokens}, CONFIG, {})["train"]
    assert figures["padded_tokens"] == 73
    assert figures["lengths"]["longest"] == {"mean": 10.3, "p5": 7, "p50": 9, "p95": 15, "max": 15}
    assert figures["lengths"]["prompt"]["mean"] == round(16 / 3, 1)


def test_too_many_refused_rows_stop_the_run_and_say_which(tmp_path: Path) -> None:
    """4 of 13 are above 0.3 and 3 of 13 are not; rows left out on request do not count."""
    few = token_set(tmp_path / "few", counts(13, 10, 3), counts(13, 10, 3))
    refuse_bad_data(Folder.at(tmp_path), {"train": few}, CONFIG)
    many = token_set(tmp_path / "many", counts(13, 9, 4), counts(13, 9, 4))
    line = {"file": "a.jsonl", "row": 7, "reason": "empty_chosen", "detail": "no text"}
    (tmp_path / "many" / "quarantine" / "0.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(DataError) as caught:
        refuse_bad_data(Folder.at(tmp_path), {"train": many}, CONFIG)
    assert caught.value.lines == (
        "train data: 4 of 13 rows are refused (4 empty_chosen), more than max_bad_fraction=0.3; "
        f"all in {tmp_path}/quarantine/train.jsonl",
        "a.jsonl:7: empty_chosen: no text",
    )
    many.report["refused"] = {"duplicate": 4}
    refuse_bad_data(Folder.at(tmp_path), {"train": many}, CONFIG)


def test_prompts_that_are_too_long_stop_the_run_where_they_are_an_error(tmp_path: Path) -> None:
    tokens = token_set(tmp_path / "set", counts(13, 12, 1), counts(13, 12, 1))
    tokens.report["refused"] = {"prompt_too_long": 1}
    line = {"file": "a.jsonl", "row": 7, "reason": "prompt_too_long", "detail": "9 tokens"}
    (tmp_path / "set" / "quarantine" / "0.jsonl").write_text(json.dumps(line) + "\n")
    refuse_bad_data(Folder.at(tmp_path), {"train": tokens}, CONFIG)
    with pytest.raises(DataError, match=r"1 prompts are too long(.|\n)*a.jsonl:7"):
        refuse_bad_data(Folder.at(tmp_path), {"train": tokens}, CONFIG.replace(truncation="error"))


def test_the_ledger_says_what_of_every_file_was_trained(tmp_path: Path) -> None:
    """Rows 1 and 3 of the first file, the one twice; row 2 was skipped; none of the second.

    Row 9 and source 7 are those of earlier, other data.
    """
    parts = (counts(5, 3, 2), counts(6, 5, 1))
    tokens = token_set(tmp_path / "set", counts(11, 8, 3), *parts)
    report = write_data_report(tmp_path, {"train": tokens}, CONFIG, {})
    lines = [
        {"step": 1, "rows": [[0, 1], [0, 3], [0, 9], [7, 1]]},
        {"step": 2, "rows": [[0, 3]], "skipped": [[0, 2]]},
    ]
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train = count_trained(tmp_path, report, tokens)["train"]
    for part, trained, skipped, not_reached in (
        (train, 2, 1, 5),
        (train["sources"]["0"], 2, 1, 0),
        (train["sources"]["1"], 0, 0, 5),
    ):
        ends = ("trained", "skipped", "not_reached")
        assert [part[f"rows_{end}"] for end in ends] == [trained, skipped, not_reached]
        ends = (*ends, "refused", "held_out")
        assert part["rows_read"] == sum(part[f"rows_{end}"] for end in ends)


def test_tokens_of_rejected_answers_that_are_not_trained_are_counted(tmp_path: Path) -> None:
    tokens = token_set(tmp_path / "set", counts(3, 3, 0), counts(3, 3, 0))
    for objective, n_unused in (("sft", 4 + 1 + 2), ("orpo", None)):
        config = CONFIG.replace(objective=objective)
        figures = write_data_report(tmp_path, {"train": tokens}, config, {})["train"]
        assert figures.get("unused_tokens") == n_unused


def test_the_lines_of_a_data_set() -> None:
    figures = counts(10, 7, 2) | {
        "rows_held_out": 1,
        "shapes": {"texts": 8},
        "truncated_prompts": 3,
        "truncated_completions": 0,
        "pairs_left_out": 0,
        "duplicate_pairs": 2,
        "contradicting_pairs": 4,
        "unused_tokens": 9,
        "ignored_columns": ["id"],
    }
    assert data_lines("train", figures) == [
        "train data: 10 rows read, 7 kept, 1 held out, 2 refused (2 empty_chosen); texts",
        "train data: 3 prompts truncated; 2 duplicate pairs (drop_duplicates); 4 pairs that "
        "another pair contradicts (chosen and rejected swapped); 9 tokens of rejected answers that "
        "are not used; columns ignored: id",
    ]


def templated(folder: Path, n_constant: int, own: list[int], n_chosen: int = 4) -> TokenSet:
    """A pair a shard: a prompt that begins with constant tokens and has `own` of its own."""
    prompts = [
        np.array([*range(100, 100 + n_constant), *(7 * i + k for k in range(n))], np.int32)
        for i, n in enumerate(own)
    ]
    shards = tuple(
        write_shard(
            str(folder / f"{i}.parquet"),
            [PromptGroup(p, (np.ones(n_chosen, np.int32), p[:1]), ((0, 1),), (RowId(0, i),))],
        )
        for i, p in enumerate(prompts)
    )
    tallies = {kind: np.zeros(60, np.int64) for kind in ("prompt", "chosen", "rejected", "longest")}
    for prompt in prompts:
        for kind, n in zip(
            tallies, (len(prompt), n_chosen, 1, len(prompt) + n_chosen), strict=True
        ):
            tallies[kind][n] += 1
    np.savez(folder / LENGTHS, **tallies)
    return TokenSet(Folder.at(folder), shards, ("a.jsonl",), {})


def test_a_system_prompt_that_is_most_of_the_nll_is_named(tmp_path: Path) -> None:
    """Three prompts of 21 constant tokens and 5 of their own, answers of 4.

    The first token is not predicted: 20 of 29 are constant, 69 %.
    """
    tokens = templated(tmp_path, 21, [5, 5, 5])
    line = constant_prompt_line(tokens, "all")
    assert line is not None
    assert "69 % of the tokens in the NLL are the same in every row: the first 21 of " in line
    assert "nll_scope=completion leaves prompts out" in line
    assert constant_prompt_line(tokens, "completion") is None


@pytest.mark.parametrize(
    ("n_constant", "own"),
    [
        (15, [10, 9, 11]),  # 14 of 28 on average: half is not most
        (0, [20, 20]),
        (40, [2]),  # a single prompt
    ],
)
def test_prompts_that_differ_are_not(tmp_path: Path, n_constant: int, own: list[int]) -> None:
    assert constant_prompt_line(templated(tmp_path, n_constant, own), "all") is None


def test_a_prompt_without_the_constant_tokens_ends_it(tmp_path: Path) -> None:
    """In the last of 30 shards, of which not all are looked at."""
    tokens = templated(tmp_path, 30, [2] * 30)
    assert constant_prompt_line(tokens, "all") is not None
    odd = PromptGroup(np.arange(9, dtype=np.int32), (np.ones(4, np.int32),) * 2, ((0, 1),), ())
    last = write_shard(str(tmp_path / "odd.parquet"), [odd])
    assert constant_prompt_line(replace(tokens, shards=(*tokens.shards, last)), "all") is None
