"""Validating a row with prompt, chosen and rejected, as text or as messages."""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

Message = Mapping[str, Any]
Content = str | tuple[Message, ...]

_LAST_TURN = "\n\nAssistant:"
USER, ASSISTANT, SYSTEM, TOOL = "user", "assistant", "system", "tool"
# Role names of chat messages and of ShareGPT, and the standard role each stands for.
_ROLES = {
    **dict.fromkeys(("user", "human"), USER),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bot"), ASSISTANT),
    **dict.fromkeys(("system", "developer"), SYSTEM),
    **dict.fromkeys(("tool", "observation", "ipython", "function"), TOOL),
}
_KEPT_ROLES = {"developer", "ipython", "function", "model"}  # chat templates expect these names


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
    MIXED_TYPES = "mixed_types"
    BAD_MESSAGE = "bad_message"
    BAD_ROLE = "bad_role"
    NOT_AN_ANSWER = "not_an_answer"
    BAD_SCORE = "bad_score"
    SCORE_GAP = "score_gap"
    EMPTY_CHOSEN = "empty_chosen"
    EMPTY_REJECTED = "empty_rejected"
    IDENTICAL_ANSWERS = "identical_answers"
    PROMPT_NOT_SHARED = "prompt_not_shared"
    TEMPLATE_REFUSED = "template_refused"
    UNSTABLE_BORDER = "unstable_border"
    SPECIAL_TOKEN = "special_token_in_text"
    PROMPT_TOO_LONG = "prompt_too_long"
    IDENTICAL_AFTER_TRUNCATION = "identical_after_truncation"
    NO_PREDICTED_TOKEN = "no_predicted_token"
    UNEXPECTED = "unexpected"
    DUPLICATE = "duplicate"
    OVERLAP = "overlap"


# Rows that a setting asks to leave out; they do not count towards `max_bad_fraction`.
ON_REQUEST = frozenset({Reason.SCORE_GAP, Reason.PROMPT_TOO_LONG, Reason.DUPLICATE, Reason.OVERLAP})


@dataclass(frozen=True)
class Refusal:
    """A row that is not trained on: the reason that it is counted under, and what was wrong."""

    reason: Reason
    detail: str


@dataclass(frozen=True)
class Record:
    """A pair before templating: three texts, or three lists of messages.

    Args:
        prompt: possibly empty.
        chosen: the preferred answer.
        rejected: the other answer.
        template: keyword arguments for the chat template, `tools` among them.
    """

    prompt: Content
    chosen: Content
    rejected: Content
    template: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt_key(self) -> str:
        """Key by which prompts are compared; a pair without a prompt is keyed by its answers."""
        blank = not self.prompt if isinstance(self.prompt, tuple) else not self.prompt.strip()
        if isinstance(self.prompt, str) and not blank:
            return self.prompt
        parts = (self.prompt, self.template) if not blank else (self.chosen, self.rejected)
        return json.dumps(parts, sort_keys=True, default=str)


def normalise(row: Mapping[str, Any]) -> Record | Refusal:
    """Read a row with the columns chosen, rejected and, optionally, prompt.

    Without a prompt column, text dialogues are split after their last `Assistant:` (hh-rlhf), and
    lists of messages before their last message; both answers must then share that prompt.
    """
    fields: dict[str, Content] = {}
    for name in ("prompt", "chosen", "rejected"):
        if name == "prompt" and name not in row:
            continue
        content = parse_content(row, name)
        if isinstance(content, Refusal):
            return content
        fields[name] = content
    if len({isinstance(content, str) for content in fields.values()}) > 1:
        return Refusal(Reason.MIXED_TYPES, "prompt, chosen and rejected mix text and messages")
    record = _split_prompt(fields)
    return record if isinstance(record, Refusal) else check_record(record)


def missing_field(row: Mapping[str, Any], name: str) -> Refusal:
    """Refuse a row for a field that is null or absent, suggesting a similarly named column."""
    if name in row:
        return Refusal(Reason.NULL_FIELD, f"{name} is null")
    columns = sorted(map(str, row))
    near = difflib.get_close_matches(name, columns, n=1)
    hint = f"; did you mean {near[0]}? column_mapping={{{name}: {near[0]}}}" if near else ""
    return Refusal(
        Reason.MISSING_FIELD,
        f"{name} is missing; the row has {', '.join(columns) or 'no fields'}{hint}",
    )


def parse_content(row: Mapping[str, Any], name: str) -> Content | Refusal:
    """Parse a field as text, or as messages that each have a role and content."""
    value = row.get(name)
    if value is None:
        return missing_field(row, name)
    if isinstance(value, str):
        return value if _is_text(value) else _lone_surrogate(name)
    if isinstance(value, Mapping):  # ShareGPT stores an answer as one message
        value = [value]
    if not isinstance(value, list):
        return Refusal(Reason.WRONG_TYPE, f"{name} is a {type(value).__name__}, not text or a list")
    messages = []
    for index, message in enumerate(value):
        found = _message(f"{name}[{index}]", message)
        if isinstance(found, Refusal):
            return found
        messages.append(found)
    return tuple(messages)


def _message(place: str, message: Any) -> Message | Refusal:
    """Normalise a message to `role` and `content`; ShareGPT calls them `from` and `value`."""
    if not isinstance(message, Mapping):
        return Refusal(Reason.BAD_MESSAGE, f"{place} is not an object")
    # Parquet stores every field for every message; null means that the message has no such field.
    found = {key: value for key, value in message.items() if value is not None}
    for key, other in (("role", "from"), ("content", "value")):
        if key not in found and other in found:
            found[key] = found.pop(other)
    if isinstance(found.get("content"), list):
        found["content"] = _join_parts(found["content"])
    if "content" not in found and found.get("tool_calls"):
        found["content"] = ""
    for key in ("role", "content"):
        if not isinstance(found.get(key), str):
            return Refusal(Reason.BAD_MESSAGE, f"{place} has no {key} that is text")
        if not _is_text(found[key]):
            return _lone_surrogate(f"{place}.{key}")
    role = found["role"]
    if role not in _ROLES:
        return Refusal(Reason.BAD_ROLE, f"{place} has the unknown role {role!r}")
    return found if role in _KEPT_ROLES else found | {"role": _ROLES[role]}


def _join_parts(parts: Sequence[Any]) -> str | None:
    """Concatenate the text parts of a message's content; None if one is not text."""
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    return "".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else None


def role_of(message: Message) -> str:
    """Return the standard role: user, assistant, system or tool."""
    return _ROLES[message["role"]]


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _lone_surrogate(name: str) -> Refusal:
    return Refusal(Reason.BAD_SURROGATE, f"{name} contains an unpaired surrogate")


def _split_prompt(fields: Mapping[str, Content]) -> Record | Refusal:
    """Build the record; without a prompt, the prefix that both answers share becomes it."""
    chosen, rejected = fields["chosen"], fields["rejected"]
    if "prompt" in fields:
        return Record(fields["prompt"], chosen, rejected)
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _split_dialogues(chosen, rejected)
    if not chosen or not rejected:
        if chosen:
            return Refusal(Reason.EMPTY_REJECTED, "rejected has no messages")
        return Refusal(Reason.EMPTY_CHOSEN, "chosen has no messages")
    if chosen[:-1] != rejected[:-1]:
        return Refusal(
            Reason.PROMPT_NOT_SHARED, "chosen and rejected differ before their last message"
        )
    return Record(chosen[:-1], chosen[-1:], rejected[-1:])


def _split_dialogues(chosen: str, rejected: str) -> Record | Refusal:
    """Split two text dialogues after their last `Assistant:`."""
    cuts = [text.rfind(_LAST_TURN) for text in (chosen, rejected)]
    if min(cuts) < 0:
        return Refusal(
            Reason.MISSING_FIELD,
            "prompt is missing, and chosen or rejected has no 'Assistant:' turn to split it from",
        )
    ends = [cut + len(_LAST_TURN) for cut in cuts]
    if chosen[: ends[0]] != rejected[: ends[1]]:
        return Refusal(
            Reason.PROMPT_NOT_SHARED, "chosen and rejected differ before their last 'Assistant:'"
        )
    return Record(chosen[: ends[0]], chosen[ends[0] :], rejected[ends[1] :])


def check_record(record: Record) -> Record | Refusal:
    """Refuse empty or identical answers, and messages whose roles are out of order."""
    for name, reason in (
        ("chosen", Reason.EMPTY_CHOSEN),
        ("rejected", Reason.EMPTY_REJECTED),
    ):
        answer = getattr(record, name)
        if isinstance(answer, tuple):
            if answer and role_of(answer[-1]) != ASSISTANT:
                return Refusal(
                    Reason.NOT_AN_ANSWER,
                    f"the last message of {name} has a role other than assistant",
                )
            wrong = _turn_order_error((*record.prompt, *answer))
            if wrong:
                return Refusal(Reason.BAD_ROLE, wrong)
            calls = any(message.get("tool_calls") for message in answer)
            answer = "".join(message["content"] for message in answer) or "call" * calls
        if not answer.strip():
            return Refusal(reason, f"{name} has no text")
    if record.chosen == record.rejected:
        return Refusal(Reason.IDENTICAL_ANSWERS, "chosen and rejected are the same")
    return record


def _turn_order_error(messages: Iterable[Any]) -> str | None:
    """Describe the first message whose role is out of order, or return None."""
    before = None
    for index, message in enumerate(messages):
        role = role_of(message)
        if role == SYSTEM and before not in (None, SYSTEM):
            return f"message {index + 1} has the role system, but comes after {before}"
        if role == USER and before == USER:
            return f"messages {index} and {index + 1} both have the role user"
        before = role
    return None


def excerpt(row: Mapping[str, Any], limit: int = 200) -> str:
    """Return the first `limit` characters of a row as JSON, for the quarantine."""
    return json.dumps(row, ensure_ascii=False, default=str)[:limit]
