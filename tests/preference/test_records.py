"""What a source row says, and every reason why it says nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from orpo_ray.preference.pairing import normalise
from orpo_ray.preference.records import Note, Reason, Record, Refusal, excerpt

HARMLESS = Path(__file__).parents[2] / "../shared/data/hh_rlhf_harmless.jsonl"


def says(role: str, content: Any = "text") -> dict[str, Any]:
    return {"role": role, "content": content}


def pair(**changes: Any) -> dict[str, Any]:
    return {"prompt": "p", "chosen": "c", "rejected": "r"} | changes


def dialogue(prompt: list[dict[str, Any]]) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": [says("assistant", "c")], "rejected": [says("assistant")]}


def test_three_texts_stay_as_they_are() -> None:
    row = {"prompt": " p\n", "chosen": "c ", "rejected": " r", "source": "elsewhere", "score": 3}
    assert normalise(row) == Record(" p\n", "c ", " r")


def test_an_empty_prompt_is_a_prompt() -> None:
    """Nothing before the answers is a model's start; only the answers must hold text."""
    notes = frozenset({Note.EMPTY_PROMPT})
    assert normalise(pair(prompt="")) == Record("", "c", "r", notes=notes)


def test_dialogues_are_cut_at_the_last_assistant() -> None:
    """The answers begin alike, and the prompt still ends at the turn, not at the first letter."""
    before = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: and?\n\nAssistant:"
    record = normalise({"chosen": before + " No, thanks", "rejected": before + " No way"})
    assert record == Record(before, " No, thanks", " No way")


def test_an_assistant_inside_a_line_is_no_turn() -> None:
    before = "\n\nHuman: hi\n\nAssistant:"
    answer = " Assistant: me\nAssistant: I"
    record = normalise({"chosen": before + answer, "rejected": before + "b"})
    assert record == Record(before, answer, "b")


def test_messages_with_a_prompt() -> None:
    prompt, chosen, rejected = (
        [says("system"), says("user")],
        [says("assistant", "c")],
        [says("assistant", "r")],
    )
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    assert normalise(row) == Record(tuple(prompt), tuple(chosen), tuple(rejected))


def test_messages_without_a_prompt_are_cut_before_the_last() -> None:
    before = [says("user"), says("assistant", "same"), says("user", "and?")]
    row = {"chosen": [*before, says("assistant", "c")], "rejected": [*before, says("assistant")]}
    assert normalise(row) == Record(tuple(before), (says("assistant", "c"),), (says("assistant"),))


def test_fields_that_parquet_filled_with_null_were_never_there() -> None:
    row = {
        "prompt": [says("user") | {"tool_calls": None, "name": "Ann"}],
        "chosen": [says("assistant", "c") | {"tool_calls": None}],
        "rejected": [says("assistant", "r")],
    }
    record = normalise(row)
    assert isinstance(record, Record)
    assert record.prompt == (says("user") | {"name": "Ann"},)
    assert record.chosen == (says("assistant", "c"),)


DIALOGUE = "\n\nHuman: hi\n\nAssistant:"
BAD_ROWS: list[tuple[dict[str, Any], Reason, str]] = [
    ({}, Reason.MISSING_FIELD, "chosen is missing; the row has no fields"),
    (
        {"prompt": "p", "chosen": "c", "rejcted": "r"},
        Reason.MISSING_FIELD,
        "rejected is missing; the row has chosen, prompt, rejcted; did you mean rejcted? "
        "column_mapping={rejected: rejcted}",
    ),
    (pair(prompt=[says("narrator")]), Reason.BAD_ROLE, "prompt[0] has the unknown role 'narrator'"),
    (
        dialogue([says("user"), says("system")]),
        Reason.BAD_ROLE,
        "message 2 has the role system, but comes after user",
    ),
    (
        dialogue([says("user"), says("user")]),
        Reason.BAD_ROLE,
        "messages 1 and 2 both have the role user",
    ),
    (pair(prompt=None), Reason.NULL_FIELD, "prompt is null"),
    (pair(chosen=None), Reason.NULL_FIELD, "chosen is null"),
    ({"chosen": "c", "rejected": "r"}, Reason.MISSING_FIELD, "no 'Assistant:' turn"),
    ({"chosen": DIALOGUE + "c", "rejected": "r"}, Reason.MISSING_FIELD, "no 'Assistant:' turn"),
    (pair(prompt=7), Reason.WRONG_TYPE, "prompt is a int"),
    (pair(chosen={"role": "assistant"}), Reason.BAD_MESSAGE, "chosen[0] has no content"),
    (pair(rejected=1.5), Reason.WRONG_TYPE, "rejected is a float"),
    (pair(chosen=True), Reason.WRONG_TYPE, "chosen is a bool"),
    (pair(chosen=b"bytes"), Reason.WRONG_TYPE, "chosen is a bytes"),
    (pair(chosen="\ud83d"), Reason.BAD_SURROGATE, "chosen contains an unpaired surrogate"),
    (pair(chosen=["c"]), Reason.BAD_MESSAGE, "chosen[0] is not an object"),
    (pair(prompt=[says("user"), {"role": "user"}]), Reason.BAD_MESSAGE, "prompt[1] has no content"),
    (pair(rejected=[{"content": "r"}]), Reason.BAD_MESSAGE, "rejected[0] has no role"),
    (pair(chosen=[says("assistant", ["part"])]), Reason.BAD_MESSAGE, "chosen[0] has no content"),
    (pair(chosen=""), Reason.EMPTY_CHOSEN, "chosen has no text"),
    (pair(chosen=" \n\t"), Reason.EMPTY_CHOSEN, "chosen has no text"),
    (pair(rejected="  "), Reason.EMPTY_REJECTED, "rejected has no text"),
    ({"chosen": DIALOGUE + " ", "rejected": DIALOGUE + "r"}, Reason.EMPTY_CHOSEN, "chosen"),
    ({"chosen": [], "rejected": [says("assistant")]}, Reason.EMPTY_CHOSEN, "no messages"),
    ({"chosen": [says("assistant")], "rejected": []}, Reason.EMPTY_REJECTED, "no messages"),
    (
        {"prompt": [says("user")], "chosen": [says("assistant")], "rejected": []},
        Reason.EMPTY_REJECTED,
        "rejected has no text",
    ),
    (
        {"prompt": [says("user")], "chosen": [says("assistant", " ")], "rejected": []},
        Reason.EMPTY_CHOSEN,
        "chosen has no text",
    ),
    (pair(chosen="r"), Reason.IDENTICAL_ANSWERS, "the same"),
    ({"chosen": DIALOGUE + "c", "rejected": DIALOGUE + "c"}, Reason.IDENTICAL_ANSWERS, "the same"),
    (
        {"chosen": [says("assistant")], "rejected": [says("assistant")]},
        Reason.MISSING_FIELD,
        "messages of the assistant alone",
    ),
    (
        dialogue([says("user"), says("assistant", "a"), says("assistant", "b"), says("user")]),
        Reason.BAD_ROLE,
        "messages 2 and 3 both have the role assistant",
    ),
    (
        {"chosen": DIALOGUE + "c", "rejected": "\n\nHuman: ho\n\nAssistant: r"},
        Reason.PROMPT_NOT_SHARED,
        "chosen and rejected differ",
    ),
    (
        {
            "chosen": [says("user", "a"), says("assistant")],
            "rejected": [says("user", "b"), says("assistant")],
        },
        Reason.PROMPT_NOT_SHARED,
        "before their last message",
    ),
    (
        {"chosen": [says("user"), says("user", "c")], "rejected": [says("user"), says("user")]},
        Reason.NOT_AN_ANSWER,
        "the last message of chosen has a role other than assistant",
    ),
]


@pytest.mark.parametrize(("row", "reason", "detail"), BAD_ROWS)
def test_a_bad_row_is_refused_with_its_reason(
    row: dict[str, Any], reason: Reason, detail: str
) -> None:
    refusal = normalise(row)
    assert isinstance(refusal, Refusal)
    assert refusal.reason is reason
    assert detail in refusal.detail


@pytest.mark.parametrize("name", ["prompt", "chosen", "rejected"])
def test_half_a_surrogate_pair_in_a_message_is_refused(name: str) -> None:
    """Such text cannot be encoded, so a tokenizer raises on it and the whole ingest ends."""
    row = {
        "prompt": [says("user")],
        "chosen": [says("assistant", "c")],
        "rejected": [says("assistant", "r")],
    }
    row[name] = [row[name][0] | {"content": "half \ud83d"}]
    assert isinstance(normalise(row), Refusal)


def test_an_excerpt_is_short_and_never_fails() -> None:
    assert excerpt({"a": "\u00e9"}) == '{"a": "\u00e9"}'
    assert excerpt({"a": b"bytes"}) == '{"a": "b\'bytes\'"}'
    assert len(excerpt({"a": "x" * 1000})) == 200


@pytest.mark.skipif(not HARMLESS.exists(), reason="hh_rlhf_harmless.jsonl is not here")
def test_real_dialogues_are_cut_where_partition_cuts_them() -> None:
    """What `rpartition` finds decides: a shared head, two answers with text, not the same."""
    n_rows = 0
    for line in HARMLESS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        (head, turn, chosen), (other, _, rejected) = (
            row[name].rpartition("\n\nAssistant:") for name in ("chosen", "rejected")
        )
        usable = head == other and chosen != rejected and chosen.strip() and rejected.strip()
        record = normalise(row)
        assert isinstance(record, Record) == bool(usable)
        if isinstance(record, Record):
            assert record == Record(head + turn, chosen, rejected)
        n_rows += 1
    assert n_rows == 1000
