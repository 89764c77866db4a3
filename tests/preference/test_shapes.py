"""Every shape of preference data, read as the pairs that it holds."""

import json
from pathlib import Path
from typing import Any

import pytest

from orpo_ray.preference.layouts import Shape
from orpo_ray.preference.records import Reason, Record, Refusal
from orpo_ray.preference.shapes import ParsedRow, RowReader


def says(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def read(row: dict[str, Any], **options: Any) -> ParsedRow:
    found = RowReader(**options).read(row)
    assert isinstance(found, ParsedRow), found
    return found


def refused(row: dict[str, Any], **options: Any) -> Refusal:
    refusal = RowReader(**options).read(row)
    assert isinstance(refusal, Refusal)
    return refusal


ASKED, GOOD, BAD = says("user", "q"), says("assistant", "c"), says("assistant", "r")
AS_MESSAGES = Record((ASKED,), (GOOD,), (BAD,))
TEXTS = Record("q", "c", "r")
DIALOGUE = "\n\nHuman: q\n\nAssistant:"
TURNS = [{"from": "human", "value": "q"}]
SHAPES: list[tuple[Shape, dict[str, Any], Record]] = [
    (Shape.TEXT, {"prompt": "q", "chosen": "c", "rejected": "r"}, TEXTS),
    (
        Shape.DIALOGUES,
        {"chosen": DIALOGUE + "c", "rejected": DIALOGUE + "r"},
        Record(DIALOGUE, "c", "r"),
    ),
    (Shape.MESSAGES, {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]}, AS_MESSAGES),
    (Shape.CONVERSATIONS, {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, AS_MESSAGES),
    (
        Shape.PROMPTED,
        {"prompt": "q", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        AS_MESSAGES,
    ),
    (
        Shape.SHAREGPT,
        {
            "conversations": TURNS,
            "chosen": {"from": "gpt", "value": "c"},
            "rejected": {"from": "gpt", "value": "r"},
        },
        AS_MESSAGES,
    ),
    (
        Shape.SHAREGPT,
        {
            "conversations": TURNS,
            "system": "s",
            "chosen": {"from": "gpt", "value": "c"},
            "rejected": [{"from": "gpt", "value": "r"}],
        },
        Record((says("system", "s"), ASKED), (GOOD,), (BAD,)),
    ),
    (Shape.ALPACA, {"instruction": "q", "chosen": "c", "rejected": "r"}, AS_MESSAGES),
    (
        Shape.ALPACA,
        {
            "instruction": "q",
            "input": "i",
            "system": "s",
            "history": [["a", "b"]],
            "chosen": "c",
            "rejected": "r",
        },
        Record(
            (
                says("system", "s"),
                says("user", "a"),
                says("assistant", "b"),
                says("user", "q\n\ni"),
            ),
            (GOOD,),
            (BAD,),
        ),
    ),
]


@pytest.mark.parametrize(("shape", "row", "record"), SHAPES)
def test_every_shape_gives_its_pair(shape: Shape, row: dict[str, Any], record: Record) -> None:
    found = read(row | {"source": "elsewhere", "id": 7})
    assert found == ParsedRow(shape, (record,), frozenset({"source", "id"}))


ANSWERS = ["worst", "best", "same", "same score"]
SCORES = [1, 4.5, "3", 3]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completions": ANSWERS, "scores": SCORES},
        {"question": "q", "responses": ANSWERS, "ratings": SCORES},
        {
            "instruction": "q",
            "completions": [
                {"response": text, "overall_score": score, "model": "m"}
                for text, score in zip(ANSWERS, SCORES, strict=True)
            ],
        },
        {
            "prompt": "q",
            "answers": [
                {"answer": text, "rank": rank}
                for text, rank in zip(ANSWERS, [3, 1, 2, 2], strict=True)
            ],
        },
    ],
)
def test_a_ranking_is_every_pair_whose_scores_differ(row: dict[str, Any]) -> None:
    """Four answers are six pairs, and two of them have the same score: five are left."""
    found = read(row)
    assert found.shape is Shape.RANKING
    assert {(record.prompt, record.chosen, record.rejected) for record in found.records} == {
        ("q", "best", "worst"),
        ("q", "same", "worst"),
        ("q", "same score", "worst"),
        ("q", "best", "same"),
        ("q", "best", "same score"),
    }
    assert found.left_out == 1


def test_a_ranking_keeps_pairs_with_the_gap_that_is_asked_for() -> None:
    """Scores 1, 4.5, 3 and 3 differ by 3.5, 2 twice, 1.5 twice and 0."""
    row = {"prompt": [ASKED], "completions": ANSWERS, "scores": SCORES}
    found = read(row, min_score_gap=2.0)
    assert [(r.chosen[0]["content"], r.rejected[0]["content"]) for r in found.records] == [  # type: ignore[index]
        ("best", "worst"),
        ("same", "worst"),
        ("same score", "worst"),
    ]
    assert found.left_out == 3
    assert refused(row, min_score_gap=5.0).reason is Reason.SCORE_GAP


def test_scores_beside_a_pair_decide_whether_it_is_kept() -> None:
    row = {"prompt": "q", "chosen": "c", "rejected": "r", "score_chosen": 7, "score_rejected": 6.5}
    assert read(row).records == (TEXTS,)
    assert read(row, min_score_gap=0.5).records == (TEXTS,)
    assert refused(row, min_score_gap=0.6).reason is Reason.SCORE_GAP
    assert read(row | {"score_chosen": None}).records == (TEXTS,)


@pytest.mark.parametrize("score", [float("nan"), float("inf"), "high", True, [1]])
def test_a_score_that_is_no_number_is_refused(score: Any) -> None:
    row = {"prompt": "q", "chosen": "c", "rejected": "r"}
    if score == score:  # NaN beside a pair is a cell without a score
        row_with_scores = row | {"score_chosen": score, "score_rejected": 1}
        assert refused(row_with_scores).reason is Reason.BAD_SCORE
    ranking = {"prompt": "q", "completions": ["a", "b"], "scores": [score, 1]}
    assert refused(ranking).reason is Reason.BAD_SCORE


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completions": ["a", "b"], "scores": [1]},
        {"prompt": "q", "completions": ["a", "b"]},
        {"prompt": "q", "completions": [{"text": "a"}, {"text": "b", "score": 1}]},
    ],
)
def test_answers_without_a_score_each_are_refused(row: dict[str, Any]) -> None:
    assert refused(row).reason is Reason.BAD_SCORE


def test_columns_with_other_names_are_mapped() -> None:
    row = {"Q": "q", "good": "c", "bad": "r", "prompt": "not this one"}
    mapping = (("prompt", "Q"), ("chosen", "good"), ("rejected", "bad"))
    assert read(row, column_mapping=mapping).records == (TEXTS,)
    refusal = refused({"Q": "q", "gud": "c", "bad": "r"}, column_mapping=mapping)
    assert refusal.reason is Reason.MISSING_FIELD
    assert refusal.detail.startswith("good is missing; the row has Q, bad, gud")


def test_tools_and_template_arguments_go_with_the_pair() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    row = {
        "prompt": [ASKED],
        "chosen": [call],
        "rejected": [BAD],
        "tools": json.dumps(tools),
        "chat_template_kwargs": {"enable_thinking": False},
    }
    (record,) = read(row).records
    assert record.template == {"enable_thinking": False, "tools": tools}
    assert record.chosen == (call | {"content": ""},)
    assert refused(row | {"tools": "no JSON"}).reason is Reason.WRONG_TYPE


def test_content_in_parts_is_their_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row = {"prompt": [says("user", parts)], "chosen": [GOOD], "rejected": [BAD]}
    assert read(row).records[0].prompt == (says("user", "ab"),)
    image = [{"type": "image", "url": "x"}]
    assert refused(row | {"prompt": [says("user", image)]}).reason is Reason.BAD_MESSAGE


def test_a_prompt_that_the_messages_do_not_have_is_refused() -> None:
    row = {"prompt": "other", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}
    assert refused(row).reason is Reason.PROMPT_NOT_SHARED


@pytest.mark.parametrize("name", ["dpo_en_sharegpt.json", "dpo_zh_sharegpt.json"])
def test_real_sharegpt_rows_are_read(shared_data: Path, name: str) -> None:
    rows = json.loads((shared_data / name).read_text(encoding="utf-8"))
    for row in rows:
        found = read(row)
        assert found.shape is Shape.SHAREGPT
        (record,) = found.records
        assert [m["content"] for m in record.prompt] == [  # type: ignore[index]
            turn["value"] for turn in row["conversations"]
        ]
        assert record.chosen[0]["content"] == row["chosen"]["value"]  # type: ignore[index]


@pytest.mark.parametrize(
    "changes",
    [
        {"input": 5},
        {"history": ["hello"]},
        {"history": [["a", "b", "c"]]},
        {"history": 5},
    ],
)
def test_an_instruction_with_odd_parts_is_refused(changes: dict[str, Any]) -> None:
    row = {"instruction": "q", "chosen": "c", "rejected": "r"}
    assert refused(row | changes).reason is Reason.WRONG_TYPE


def test_a_ranking_that_is_bad_says_why() -> None:
    """And not that scores are too near each other, which is no sign of bad data."""
    twice = [ASKED, ASKED]
    row = {"prompt": twice, "completions": ["a", "b"], "scores": [1, 2]}
    assert refused(row).reason is Reason.BAD_ROLE
    row = {"prompt": "q", "completions": ["a", " "], "scores": [1, 2]}
    assert refused(row).reason is Reason.EMPTY_CHOSEN
    assert refused(row | {"scores": [2, 2]}).reason is Reason.BAD_SCORE
    assert refused(row | {"scores": [10**400, 2]}).reason is Reason.BAD_SCORE
    row = {"prompt": "q", "completions": None, "responses": ["a", "b"], "scores": [1, 2]}
    assert len(read(row).records) == 1
