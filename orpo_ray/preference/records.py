"""What one source row says: prompt, chosen and rejected, as text or as messages."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

Message = Mapping[str, Any]
Content = str | tuple[Message, ...]

_LAST_TURN = "\n\nAssistant:"


class Reason(StrEnum):
    """Why a row is not trained on; the values are the names in reports."""

    MALFORMED_JSON = "malformed_json"
    NOT_AN_OBJECT = "not_an_object"
    MISSING_FIELD = "missing_field"
    WRONG_TYPE = "wrong_type"
    MIXED_TYPES = "mixed_types"
    BAD_MESSAGE = "bad_message"
    NOT_AN_ANSWER = "not_an_answer"
    EMPTY_CHOSEN = "empty_chosen"
    EMPTY_REJECTED = "empty_rejected"
    IDENTICAL_ANSWERS = "identical_answers"
    PROMPT_NOT_SHARED = "prompt_not_shared"
    TEMPLATE_REFUSED = "template_refused"
    NOTHING_LEFT = "nothing_left_after_truncation"
    IDENTICAL_AFTER_TRUNCATION = "identical_after_truncation"
    NO_PREDICTED_TOKEN = "no_predicted_token"


@dataclass(frozen=True)
class Refusal:
    """A row that is not trained on, and what exactly was wrong with it."""

    reason: Reason
    detail: str


@dataclass(frozen=True)
class Record:
    """A pair as its source has it: three texts, or three lists of messages."""

    prompt: Content
    chosen: Content
    rejected: Content


def normalise(row: Mapping[str, Any]) -> Record | Refusal:
    """Find prompt, chosen and rejected in a source row, or say why they are not there.

    Without a prompt column, dialogues in text are cut after their last `Assistant:` (hh-rlhf), and
    lists of messages before their last message; the two prompts must then be the same.
    """
    fields: dict[str, Content] = {}
    for name in ("prompt", "chosen", "rejected"):
        value = row.get(name)
        if value is None:
            if name == "prompt" and name not in row:
                continue
            return Refusal(Reason.MISSING_FIELD, f"{name} is {_state(row, name)}")
        content = _content(name, value)
        if isinstance(content, Refusal):
            return content
        fields[name] = content
    if len({isinstance(content, str) for content in fields.values()}) > 1:
        return Refusal(Reason.MIXED_TYPES, "some of prompt, chosen and rejected are text, some not")
    record = _with_prompt(fields)
    return record if isinstance(record, Refusal) else _checked(record)


def _state(row: Mapping[str, Any], name: str) -> str:
    if name in row:
        return "null"
    return f"missing; the row has {', '.join(sorted(map(str, row))) or 'no fields'}"


def _content(name: str, value: Any) -> Content | Refusal:
    """Text, or a list of messages each with a role and content."""
    if isinstance(value, str):
        return value if _is_text(value) else _half_a_pair(name)
    if not isinstance(value, list):
        return Refusal(Reason.WRONG_TYPE, f"{name} is a {type(value).__name__}, not text or a list")
    for index, message in enumerate(value):
        if not isinstance(message, Mapping):
            return Refusal(Reason.BAD_MESSAGE, f"{name}[{index}] is not an object")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                return Refusal(Reason.BAD_MESSAGE, f"{name}[{index}] has no {key} that is text")
            if not _is_text(message[key]):
                return _half_a_pair(f"{name}[{index}].{key}")
    # Parquet gives every message every field; those that are null were never there.
    return tuple({k: v for k, v in message.items() if v is not None} for message in value)


def _is_text(value: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _half_a_pair(name: str) -> Refusal:
    return Refusal(Reason.WRONG_TYPE, f"{name} holds half of a surrogate pair, not text")


def _with_prompt(fields: dict[str, Content]) -> Record | Refusal:
    """Take the prompt from the answers when the row has none of its own."""
    chosen, rejected = fields["chosen"], fields["rejected"]
    if "prompt" in fields:
        return Record(fields["prompt"], chosen, rejected)
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _cut_texts(chosen, rejected)
    if not chosen or not rejected:
        side = Reason.EMPTY_REJECTED if chosen else Reason.EMPTY_CHOSEN
        return Refusal(side, "has no messages")
    if chosen[:-1] != rejected[:-1]:
        return Refusal(Reason.PROMPT_NOT_SHARED, "messages differ before the last one")
    return Record(chosen[:-1], chosen[-1:], rejected[-1:])


def _cut_texts(chosen: str, rejected: str) -> Record | Refusal:
    """Split two dialogues after their last `Assistant:`."""
    cuts = [text.rfind(_LAST_TURN) for text in (chosen, rejected)]
    if min(cuts) < 0:
        return Refusal(
            Reason.MISSING_FIELD,
            "prompt is missing, and the answers hold no 'Assistant:' turn to cut it at",
        )
    ends = [cut + len(_LAST_TURN) for cut in cuts]
    if chosen[: ends[0]] != rejected[: ends[1]]:
        return Refusal(Reason.PROMPT_NOT_SHARED, "dialogues differ before the last 'Assistant:'")
    return Record(chosen[: ends[0]], chosen[ends[0] :], rejected[ends[1] :])


def _checked(record: Record) -> Record | Refusal:
    """Refuse pairs with nothing to prefer."""
    for name, reason in (
        ("chosen", Reason.EMPTY_CHOSEN),
        ("rejected", Reason.EMPTY_REJECTED),
    ):
        answer = getattr(record, name)
        if isinstance(answer, tuple):
            if answer and answer[-1]["role"] != "assistant":
                return Refusal(Reason.NOT_AN_ANSWER, f"{name} does not end with the assistant")
            answer = "".join(message["content"] for message in answer)
        if not answer.strip():
            return Refusal(reason, f"{name} has no text")
    if record.chosen == record.rejected:
        return Refusal(Reason.IDENTICAL_ANSWERS, "chosen and rejected are the same")
    return record


def excerpt(row: Mapping[str, Any], limit: int = 200) -> str:
    """The start of a row as JSON, for the quarantine."""
    return json.dumps(row, ensure_ascii=False, default=str)[:limit]
