"""Where the prompt of a row ends: it is never lost, doubled or trained as an answer."""

from typing import Any

import pytest

from orpo_ray.preference.layouts import Shape
from orpo_ray.preference.messages import mapping_hint
from orpo_ray.preference.records import Note, Reason, Record, Refusal
from orpo_ray.preference.shapes import ParsedRow, RowReader


def says(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ASKED, GOOD, BAD = says("user", "q"), says("assistant", "c"), says("assistant", "r")
SYSTEM = says("system", "s")
ALONE = {"chosen": [GOOD], "rejected": [BAD]}
CHAT = Record((ASKED,), (GOOD,), (BAD,))


def read(row: dict[str, Any]) -> ParsedRow:
    found = RowReader().read(row)
    assert isinstance(found, ParsedRow), found
    return found


def refused(row: dict[str, Any]) -> Refusal:
    found = RowReader().read(row)
    assert isinstance(found, Refusal), found
    return found


PROMPTS: dict[str, dict[str, Any]] = {
    "conversation": ALONE | {"conversation": [ASKED]},
    "context of messages": ALONE | {"context": [ASKED]},
    "dialogue as one object": ALONE | {"dialogue": ASKED},
    "query": ALONE | {"query": "q"},
    "input": ALONE | {"input": "q"},
    "problem and texts": {"problem": "q", "chosen": "c", "rejected": "r"},
    "history of messages": ALONE | {"history": [ASKED]},
    "messages that end with the answer": ALONE | {"messages": [ASKED, GOOD]},
    "an empty prompt beside": ALONE | {"prompt": "", "instruction": "q"},
    "text answers beside messages": {"messages": [ASKED], "chosen": "c", "rejected": "r"},
    "one answer a text": {"prompt": "q", "chosen": [GOOD], "rejected": "r"},
    "one answer an object": {"prompt": [ASKED], "chosen": GOOD, "rejected": [BAD]},
    "an empty prompt, whole conversations": {
        "prompt": [],
        "chosen": [ASKED, GOOD],
        "rejected": [ASKED, BAD],
    },
    "a prompt that one answer repeats": {
        "prompt": [ASKED],
        "chosen": [ASKED, GOOD],
        "rejected": [BAD],
    },
    "white space around the repeated prompt": {
        "prompt": [ASKED],
        "chosen": [says("user", " q\n"), GOOD],
        "rejected": [ASKED, BAD],
    },
}


@pytest.mark.parametrize("name", PROMPTS)
def test_the_prompt_is_found(name: str) -> None:
    (record,) = read(PROMPTS[name]).records
    assert (record.prompt, record.chosen, record.rejected) == ((ASKED,), (GOOD,), (BAD,))


def test_a_system_prompt_alone_goes_before_whole_conversations() -> None:
    whole = {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}
    for row in (
        whole | {"prompt": [SYSTEM]},
        whole | {"prompt": "q", "system": "s"},
        {"prompt": [SYSTEM], "chosen": [SYSTEM, ASKED, GOOD], "rejected": [SYSTEM, ASKED, BAD]},
        {"question": "q", "system_prompt": "s", "chosen": "c", "rejected": "r"},
        {"prompt": "q", "system": "s", "chosen": "c", "rejected": "r"},
    ):
        (record,) = read(row).records
        assert (record.prompt, record.chosen) == ((SYSTEM, ASKED), (GOOD,)), row


def test_a_conversation_that_both_answers_continue() -> None:
    """The question in both answers is the prompt's, not the answers'."""
    head, more = [ASKED, says("assistant", "a")], says("user", "and?")
    row = {"prompt": head, "chosen": [more, GOOD], "rejected": [more, BAD]}
    assert read(row).records == (Record((*head, more), (GOOD,), (BAD,)),)


def test_an_open_answer_that_the_answers_repeat_is_taken_off_them() -> None:
    start = says("assistant", "It is")
    row = {
        "prompt": [ASKED, start],
        "chosen": [says("assistant", "It is Bonn.")],
        "rejected": [says("assistant", "It is Oslo.")],
    }
    (record,) = read(row).records
    assert record.chosen == (says("assistant", " Bonn."),)
    assert record.rejected == (says("assistant", " Oslo."),)
    assert record.notes == {Note.PROMPT_REPEATED}


NOT_PAIRS: dict[str, tuple[dict[str, Any], Reason, str]] = {
    "no prompt at all": (ALONE, Reason.MISSING_FIELD, "assistant alone"),
    "a column that no shape knows": (
        ALONE | {"ask": "q"},
        Reason.MISSING_FIELD,
        "if ask holds it, set column_mapping={prompt: ask}",
    ),
    "texts and no prompt": (
        {"ask it": "q", "chosen": "c", "rejected": "r"},
        Reason.MISSING_FIELD,
        'column_mapping={prompt: "ask it"}',
    ),
    "another question in the answers": (
        {"prompt": [ASKED], "chosen": [says("user", "x"), GOOD], "rejected": [BAD]},
        Reason.PROMPT_NOT_SHARED,
        "chosen begins with a message of the role user",
    ),
    "texts that repeat the prompt": (
        {"prompt": "Who is\nit? A:", "chosen": "Who is it? A: c", "rejected": " Who is\nit? A:r"},
        Reason.PROMPT_REPEATED,
        "begin with the prompt",
    ),
    "messages that repeat the question": (
        {
            "prompt": [says("user", "Which town is it?")],
            "chosen": [says("assistant", "Which town is it? Bonn.")],
            "rejected": [says("assistant", "<|user|>\nWhich town is it?")],
        },
        Reason.PROMPT_REPEATED,
        "begin with the user's message",
    ),
    "an empty prompt beside an unknown column": (
        ALONE | {"prompt": [], "ask": "q"},
        Reason.MISSING_FIELD,
        "prompt is empty",
    ),
    "calls that are none": (
        {"prompt": [ASKED], "chosen": [GOOD | {"tool_calls": ["f(1)"]}], "rejected": [BAD]},
        Reason.BAD_MESSAGE,
        "not a call",
    ),
    "messages that end with another answer": (
        ALONE | {"messages": [ASKED, says("assistant", "other")]},
        Reason.BAD_ROLE,
        "another answer",
    ),
    "two answers in a row": (
        {"prompt": [ASKED], "chosen": [GOOD, says("assistant", "more")], "rejected": [BAD]},
        Reason.BAD_ROLE,
        "messages 2 and 3 both have the role assistant",
    ),
    "lists of messages of different lengths": (
        {"prompt": {"role": ["user"], "content": ["q", "p"]}, "chosen": "c", "rejected": "r"},
        Reason.BAD_MESSAGE,
        "different numbers",
    ),
    "half of a list of messages": (
        {"prompt": '[{"role": "user", "content": ', "chosen": "c", "rejected": "r"},
        Reason.WRONG_TYPE,
        "not valid JSON",
    ),
    "a call that is no call": (
        {"prompt": [ASKED], "chosen": [says("function_call", "no JSON")], "rejected": [BAD]},
        Reason.BAD_MESSAGE,
        "not a call in JSON",
    ),
}


@pytest.mark.parametrize("name", NOT_PAIRS)
def test_a_row_whose_prompt_is_uncertain_is_refused(name: str) -> None:
    row, reason, detail = NOT_PAIRS[name]
    refusal = refused(row)
    assert refusal.reason is reason
    assert detail in refusal.detail


def test_answers_that_begin_with_a_word_of_the_prompt_are_answers() -> None:
    for prompt in ("Rome", "Is it", "Good morning!", "Translate:"):
        row = {"prompt": prompt, "chosen": f"{prompt} yes", "rejected": f"{prompt} no"}
        assert read(row).records[0].chosen == f"{prompt} yes"
    row = {"prompt": "Name all the cat", "chosen": "Name all the cats", "rejected": "r"}
    assert read(row).records[0].notes == frozenset()


MESSAGES_AS: dict[str, Any] = {
    "JSON": '[{"role": "user", "content": "q"}]',
    "what Python prints": "[{'role': 'user', 'content': 'q'}]",
    "JSON of one message": ' {"content": "q", "role": "user"}',
    "ShareGPT in JSON": '[{"from": "human", "value": "q"}]',
    "lists of columns": {"role": ["user"], "content": ["q"]},
    "lists of ShareGPT columns": {"from": ["human"], "value": ["q"]},
    "a role in capitals": [says("USER", "q")],
    "JSON in JSON": '"[{\\"role\\": \\"user\\", \\"content\\": \\"q\\"}]"',
}


@pytest.mark.parametrize("name", MESSAGES_AS)
def test_messages_are_read_in_every_spelling(name: str) -> None:
    assert read(ALONE | {"prompt": MESSAGES_AS[name]}).records == (CHAT,)


def test_the_order_of_fields_does_not_matter() -> None:
    (record,) = read(ALONE | {"prompt": '[{"id": 1, "role": "user", "content": "q"}]'}).records
    assert record.prompt == (says("user", "q", id=1),)


def test_a_text_about_messages_stays_a_text() -> None:
    for chosen, rejected in (
        ('[{"role": "user", "content": "x"}]', "no"),
        ('{"value": 3}', '{"content": 3'),
        ('[{"role": "admin", "name": "x"}]', '[{"role": "guest", "name": "x"}]'),
    ):
        row = {"prompt": "In JSON?", "chosen": chosen, "rejected": rejected}
        assert read(row).records[0].chosen == chosen


def test_calls_and_results_of_tools_as_big_formats_spell_them() -> None:
    first, second = ('{"name": "f", "arguments": {"x": 1}}', '{"name": "g", "arguments": {}}')
    row = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "tool_call", "value": first},
            {"from": "tool_call", "value": second},
            {"from": "observation", "value": "1"},
        ],
        "chosen": {"from": "gpt", "value": "c"},
        "rejected": {"from": "gpt", "value": "r"},
    }
    (record,) = read(row).records
    assert [message["role"] for message in record.prompt] == ["user", "assistant", "tool"]  # type: ignore[index]
    calls = record.prompt[1]["tool_calls"]  # type: ignore[index]
    assert [call["function"]["name"] for call in calls] == ["f", "g"]


COMPARED: dict[str, tuple[dict[str, Any], str]] = {
    "PKU-SafeRLHF": ({"response_0": "r", "response_1": "c", "better_response_id": 1}, "prompt"),
    "SHP": ({"human_ref_A": "r", "human_ref_B": "c", "labels": 0}, "history"),
    "HelpSteer2": ({"response_1": "c", "response_2": "r", "preference_strength": -2}, "prompt"),
    "HelpSteer3": ({"response1": "r", "response2": "c", "overall_preference": 1}, "context"),
    "Arena": ({"response_a": "r", "response_b": "c", "winner": "model_b"}, "prompt"),
}


@pytest.mark.parametrize("name", COMPARED)
def test_two_answers_and_the_preferred_one(name: str) -> None:
    answers, prompt = COMPARED[name]
    found = read(answers | {prompt: [ASKED], "source": "x"})
    assert found.shape is Shape.COMPARISON
    assert found.records == (CHAT,)
    assert found.ignored == {"source"}
    column = list(answers)[2]
    none: dict[str, Any] = {column: "tie" if name == "Arena" else "0.5"}
    if column.startswith(("pref", "over")):
        none = {column: 0}
    assert refused(answers | {prompt: [ASKED]} | none).reason is Reason.BAD_SCORE


def test_conversations_of_an_arena() -> None:
    row = {
        "conversation_a": [ASKED, BAD],
        "conversation_b": [ASKED, GOOD],
        "winner": "model_b",
    }
    assert read(row).records == (CHAT,)


def test_scores_beside_a_pair_are_compared() -> None:
    for names in (("chosen_score", "rejected_score"), ("chosen-rating", "rejected-rating")):
        for scores, notes in (
            ((2, 1), set()),
            ((1, "2"), {Note.SCORES_REVERSED}),
            ((3, 3.0), {Note.SCORES_EQUAL}),
        ):
            row = {"prompt": "q", "chosen": "c", "rejected": "r"}
            assert read(row | dict(zip(names, scores, strict=True))).records[0].notes == notes


@pytest.mark.parametrize("word", ["nan", "None", " NULL ", "N/A", "<NA>"])
def test_a_word_for_a_missing_value_is_noted(word: str) -> None:
    for name in ("prompt", "chosen", "rejected"):
        row = {"prompt": "q", "chosen": "c", "rejected": "r"} | {name: word}
        assert Note.MISSING_WORD in read(row).records[0].notes
    assert not read({"prompt": "q", "chosen": "None of them", "rejected": "r"}).records[0].notes


def test_null_columns_are_no_columns() -> None:
    row = {
        **dict.fromkeys(
            ("prompt", "messages", "conversations", "instruction", "question", "tools")
        ),
        "chosen": [ASKED, GOOD],
        "rejected": [ASKED, BAD],
    }
    found = read(row)
    assert found.records == (CHAT,)
    assert found.shape is Shape.CONVERSATIONS
    assert found.ignored == frozenset()


@pytest.mark.parametrize("column", ["Chosen", " chosen", "chosen text", "no", "\ufeffchosn"])
def test_a_suggested_mapping_reads_the_row(column: str) -> None:
    """The hint of an error, as it is typed on the command line."""
    from orpo_ray.config.file import load_config

    row = {"prompt": "q", column: "c", "rejected": "r"}
    found = RowReader().read(row)
    hint = mapping_hint("chosen", column.strip())
    if isinstance(found, Refusal) and "column_mapping" in found.detail:
        hint = found.detail.rpartition("column_mapping")[2]
        hint = f"column_mapping{hint}"
    if isinstance(found, Refusal):
        mapping = load_config(None, [hint]).data.column_mapping
        assert mapping is not None
        row = {name.strip(): value for name, value in row.items()}
        found = RowReader(tuple(mapping.items())).read(row)
    assert isinstance(found, ParsedRow), found
    assert found.records == (Record("q", "c", "r"),)


def test_the_prompt_of_a_ranking_is_whole() -> None:
    answers = {"responses": ["c", "r"], "scores": [2, 1]}
    for columns, prompt in (
        ({"instruction": "Add", "input": "1"}, (says("user", "Add\n\n1"),)),
        ({"prompt": "", "question": "q"}, "q"),
        ({"messages": [ASKED], "question": None}, (ASKED,)),
        ({"question": "q", "system": "s"}, (SYSTEM, ASKED)),
    ):
        (record,) = read(answers | columns).records
        assert record.prompt == prompt, columns


def test_a_system_message_beside_is_not_lost() -> None:
    for row in (
        {"system": "s", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        ALONE | {"prompt": [SYSTEM], "question": "q"},
        ALONE | {"prompt": [SYSTEM], "messages": [ASKED]},
        {"system_message": "s", "prompt": "q", "chosen": [GOOD], "rejected": [BAD]},
    ):
        assert read(row).records[0].prompt == (SYSTEM, ASKED), row


def test_a_mapped_column_that_is_not_read_is_refused() -> None:
    row = {"prompt": "other", "q": "q", "chosen": "c", "rejected": "r"}
    refusal = RowReader((("question", "q"),)).read(row)
    assert isinstance(refusal, Refusal)
    assert "question is not read" in refusal.detail


@pytest.mark.parametrize(
    "column", ["tools", "chat_template_kwargs", "system", "score_chosen", "input", "history"]
)
@pytest.mark.parametrize("value", [None, float("nan"), ""])
def test_a_mapped_column_may_be_empty(column: str, value: Any) -> None:
    """In rows of a joined data set, or because texts take no tools."""
    name = "prompt" if column in ("tools", "chat_template_kwargs") else "question"
    mapping = ((name, "q"), ("chosen", "good"), ("rejected", "bad"), (column, "x"))
    found = RowReader(mapping).read({"q": "q", "good": "c", "bad": "r", "x": value})
    assert isinstance(found, ParsedRow), found


def test_scores_of_every_shape_are_compared() -> None:
    row = {"messages": [ASKED, GOOD], "rejected_response": "r"}
    row |= {"chosen_avg_rating": 1.0, "rejected_avg_rating": 2.0}
    assert read(row).records[0].notes == {Note.SCORES_REVERSED}
    refusal = RowReader(min_score_gap=0.5).read(row)
    assert isinstance(refusal, Refusal)
    assert refusal.reason is Reason.SCORE_GAP
    empty = {"prompt": "q", "chosen": "c", "rejected": "r", "score_chosen": "", "score_rejected": 1}
    assert read(empty).records[0].notes == frozenset()


CALL = {"name": "f", "arguments": {"x": 1}}
CALLS: dict[str, dict[str, Any]] = {
    "text of a call": {"tool_calls": '[{"name": "f", "arguments": {"x": 1}}]'},
    "a call without its list": {"tool_calls": {"function": CALL}},
    "calls without their function": {"tool_calls": [CALL]},
    "the older function_call": {"function_call": CALL | {"arguments": '{"x": 1}'}},
    "arguments that are encoded twice": {"tool_calls": [CALL | {"arguments": '"{\\"x\\": 1}"'}]},
    "parameters": {"tool_calls": [{"name": "f", "parameters": {"x": 1}}]},
    "each call as text": {"tool_calls": ['{"name": "f", "arguments": {"x": 1}}']},
}


@pytest.mark.parametrize("name", CALLS)
def test_tool_calls_are_read_in_every_spelling(name: str) -> None:
    chosen = {"role": "assistant", "content": None} | CALLS[name]
    (record,) = read({"prompt": [ASKED], "chosen": [chosen], "rejected": [BAD]}).records
    (call,) = record.chosen[0]["tool_calls"]  # type: ignore[index]
    assert call["function"]["name"] == "f"
    assert call["function"]["arguments"] == {"x": 1}
