"""A pair before templating, why a row is refused, and what is odd about a row that is kept."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

Message = Mapping[str, Any]
Content = str | tuple[Message, ...]

USER, ASSISTANT, SYSTEM, TOOL = "user", "assistant", "system", "tool"


class Reason(StrEnum):
    """Why a row is not trained on; the values are the names in `data_report.json`."""

    MALFORMED_JSON = "malformed_json"
    MALFORMED_TABLE = "malformed_table_row"
    TORN_LINE = "torn_last_line"
    NOT_UTF8 = "not_utf8"
    DUPLICATE_KEY = "duplicate_key"
    TOO_DEEP = "nested_too_deep"
    BAD_SURROGATE = "bad_surrogate"
    NOT_AN_OBJECT = "not_an_object"
    MISSING_FIELD = "missing_field"
    NULL_FIELD = "null_field"
    WRONG_TYPE = "wrong_type"
    BAD_MESSAGE = "bad_message"
    BAD_ROLE = "bad_role"
    NOT_AN_ANSWER = "not_an_answer"
    BAD_SCORE = "bad_score"
    SCORE_GAP = "score_gap"
    EMPTY_CHOSEN = "empty_chosen"
    EMPTY_REJECTED = "empty_rejected"
    IDENTICAL_ANSWERS = "identical_answers"
    PROMPT_REPEATED = "prompt_repeated"
    PROMPT_NOT_SHARED = "prompt_not_shared"
    TEMPLATE_REFUSED = "template_refused"
    TEMPLATE_DROPS = "template_drops"
    UNSTABLE_BORDER = "unstable_border"
    SPECIAL_TOKEN = "special_token_in_text"
    TOO_LARGE = "row_too_large"
    PROMPT_TOO_LONG = "prompt_too_long"
    IDENTICAL_AFTER_TRUNCATION = "identical_after_truncation"
    NO_PREDICTED_TOKEN = "no_predicted_token"
    UNEXPECTED = "unexpected"
    DUPLICATE = "duplicate"
    OVERLAP = "overlap"


# Rows that a setting asks to leave out; they do not count towards `max_bad_fraction`.
ON_REQUEST = frozenset({Reason.SCORE_GAP, Reason.PROMPT_TOO_LONG, Reason.DUPLICATE, Reason.OVERLAP})


class Note(StrEnum):
    """What is odd about a row that is kept; the values are the names in `data_report.json`."""

    PROMPT_REPEATED = "prompt_repeated"
    ONE_REPEATS = "prompt_repeated_in_one_answer"
    SCORES_REVERSED = "scores_reversed"
    SCORES_EQUAL = "scores_equal"
    EMPTY_PROMPT = "empty_prompt"
    MISSING_WORD = "missing_value_word"
    TEMPLATE_UNUSED = "template_unused"
    DROPS_SYSTEM = "template_drops_system"
    DROPS_USER = "template_drops_user"
    DROPS_ASSISTANT = "template_drops_assistant"
    DROPS_TOOL = "template_drops_tool_result"
    DROPS_TOOLS = "template_drops_tools"
    DROPS_CALLS = "template_drops_tool_calls"
    DROPS_THOUGHTS = "template_drops_thoughts"
    DROPS_ARGUMENTS = "template_ignores_arguments"
    TEMPLATE_REPEATS = "template_repeats"
    TEMPLATE_ASKS_AGAIN = "template_asks_again"
    TEMPLATE_DATE = "template_date"
    OPENING_CUT = "answer_opening_cut"
    LOST_CHARACTERS = "lost_characters"


NOTE_TEXTS: Mapping[Note, str] = {
    Note.PROMPT_REPEATED: "rows repeat the prompt in the answers; it is taken off them",
    Note.ONE_REPEATS: "rows repeat the prompt in one of the answers, which keeps it",
    Note.SCORES_REVERSED: "rows have a higher score for the rejected answer",
    Note.SCORES_EQUAL: "rows have the same score for both answers",
    Note.EMPTY_PROMPT: "rows have an empty prompt",
    Note.MISSING_WORD: "rows have a text that is only nan, None, null or NA: missing cells?",
    Note.TEMPLATE_UNUSED: (
        "rows are texts, which are trained as they are: the chat template is not applied to them"
    ),
    Note.DROPS_SYSTEM: "rows have a system message that the chat template leaves out",
    Note.DROPS_USER: "rows have a user message of which the chat template leaves out text",
    Note.DROPS_ASSISTANT: "rows have an assistant message of which the template leaves out text",
    Note.DROPS_TOOL: "rows have a tool's result that the chat template leaves out",
    Note.DROPS_TOOLS: "rows have tools that the chat template leaves out",
    Note.DROPS_CALLS: "rows have tool calls that the chat template leaves out",
    Note.DROPS_THOUGHTS: "rows have thoughts that the chat template leaves out",
    Note.DROPS_ARGUMENTS: "rows have chat_template_kwargs that the chat template does not use",
    Note.TEMPLATE_REPEATS: "rows have a message that the chat template renders more than once",
    Note.TEMPLATE_ASKS_AGAIN: (
        "rows are rendered with text after the end of the answer, which is cut off"
    ),
    Note.TEMPLATE_DATE: "rows are rendered with a date (strftime_now), which template_date sets",
    Note.OPENING_CUT: (
        "rows are trained without the last part of the generation prompt (such as <think>), which "
        "the chat template does not write before a given answer"
    ),
    Note.LOST_CHARACTERS: "rows have characters that are unknown to the tokenizer",
}
# Notes for which `template_drops=refuse` refuses a row.
TEMPLATE_DROPS = frozenset(
    {
        *(Note.DROPS_SYSTEM, Note.DROPS_USER, Note.DROPS_ASSISTANT, Note.DROPS_TOOL),
        *(Note.DROPS_TOOLS, Note.DROPS_CALLS, Note.DROPS_THOUGHTS, Note.DROPS_ARGUMENTS),
    }
)


@dataclass(frozen=True)
class Refusal:
    """A row that is not trained on: the reason that it is counted under, and what was wrong."""

    reason: Reason
    detail: str


@dataclass(frozen=True)
class Record:
    """A pair before templating: three texts, or three lists of messages.

    Args:
        prompt: possibly empty; if it ends with an assistant message, the answers continue that.
        chosen: the preferred answer.
        rejected: the other answer.
        template: keyword arguments for the chat template, `tools` among them.
        notes: what is odd about the pair.
    """

    prompt: Content
    chosen: Content
    rejected: Content
    template: Mapping[str, Any] = field(default_factory=dict)
    notes: frozenset[Note] = frozenset()

    @property
    def prompt_key(self) -> str:
        """Key by which prompts are compared; a pair without a prompt is keyed by its answers."""
        blank = not self.prompt if isinstance(self.prompt, tuple) else not self.prompt.strip()
        if isinstance(self.prompt, str) and not blank:
            return self.prompt
        parts = (self.prompt, self.template) if not blank else (self.chosen, self.rejected)
        return json.dumps(parts, sort_keys=True, default=str)


def n_characters(record: Record) -> int:
    """Number of characters of the prompt and the longer answer."""
    prompt, *answers = (
        len(part) if isinstance(part, str) else sum(len(message["content"]) for message in part)
        for part in (record.prompt, record.chosen, record.rejected)
    )
    return prompt + max(answers)


def text_length(value: Any) -> int:
    """Number of characters of all texts in a decoded row, or in a part of it."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return 0
    return sum(map(text_length, value))


def excerpt(row: Mapping[str, Any], limit: int = 200) -> str:
    """Return the first `limit` characters of a row as JSON, for the quarantine."""
    return json.dumps(row, ensure_ascii=False, default=str)[:limit]
