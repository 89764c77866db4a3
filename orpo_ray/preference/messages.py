"""Parsing a field of a row as text or as chat messages, in every spelling that is read."""

import ast
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from orpo_ray.preference.records import (
    ASSISTANT,
    SYSTEM,
    TOOL,
    USER,
    Content,
    Message,
    Reason,
    Refusal,
)

# Roles of a tool call whose content is the call as JSON text (ShareGPT, ms-swift).
_CALL_ROLES = ("tool_call", "function_call")
# Role names of chat messages and of ShareGPT, and the standard role each stands for.
_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), USER),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bot", "ai", *_CALL_ROLES), ASSISTANT),
    **dict.fromkeys(("system", "developer"), SYSTEM),
    **dict.fromkeys(("tool", "observation", "ipython", "function", "tool_response"), TOOL),
    **dict.fromkeys(("tool_result", "function_response"), TOOL),
}
# Names that some chat templates expect instead of the standard role.
OWN_ROLES = frozenset({"developer", "ipython", "function", "model"})
# Text that messages are written as: JSON, JSON of JSON text, or Python's repr of dicts.
_LISTED = re.compile(r"""\s*"?\s*(?:\[\s*\]\s*$|\[?\s*\{)""")
_MESSAGES = re.compile(
    r"""\s*\[\s*\{\s*["'](?:role|from)["']\s*:\s*["'](?:user|human|system)["']"""
)
MESSAGE_COLUMNS = frozenset(
    {
        *("prompt", "chosen", "rejected", "messages", "conversations", "conversation", "context"),
        *("history", "dialogue", "preferred_output", "non_preferred_output", "rejected_messages"),
        *("rejected_response", "conversation_a", "conversation_b"),
    }
)
"""Columns whose text may be that of messages."""
_PLAIN_NAME = re.compile(r"[A-Za-z_][\w.-]*")
# Columns about a text, not with it; and of the other answer.
_NOT_TEXT = re.compile(
    r"(?:^|_)(?:idx?|uuid|model|source|dataset|split|rating|score|reward|rank|label|lang|category|"
    r"categories|reject\w*|lose\w*|loss|worse)$",
    re.IGNORECASE,
)
_TEXT_ENDS = ("_response", "_answer", "_text", "_output", "_completion")
# Words that YAML reads as a boolean or as null.
_YAML_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}


class JsonObject(dict[str, Any]):
    """Arguments of a tool call that were JSON text, which a template may want back.

    Args:
        values: the decoded object.
        text: the JSON text.
    """

    def __init__(self, values: Mapping[str, Any], text: str) -> None:
        super().__init__(values)
        self.text = text


def role_of(message: Message) -> str:
    """Return the standard role: user, assistant, system or tool."""
    return _ROLES[message["role"].lower()]


def missing_field(
    row: Mapping[str, Any], name: str, used: Sequence[str] = (), field: str = ""
) -> Refusal:
    """Refuse a row for a field that is null or absent, suggesting a column that may be meant.

    Args:
        row: the source row.
        name: of the field.
        used: columns that hold other fields, and are not suggested.
        field: what the field is called, if `name` is the column that it is mapped to.
    """
    if name in row and row[name] is None:
        return Refusal(Reason.NULL_FIELD, f"{name} is null")
    columns = sorted(map(str, row))
    texts = [c for c in columns if c not in used and isinstance(row[c], str | list | dict)]
    texts = [c for c in texts if not _NOT_TEXT.search(c)]
    key = field or name
    near = difflib.get_close_matches(name, texts, n=1)
    near = near or [c for c in texts if c.lower().startswith(name) and c.endswith(_TEXT_ENDS)]
    hint = ""
    if near:
        hint = f"; did you mean {near[0]}? {mapping_hint(key, near[0])}"
    elif used and len(texts) == 1:
        hint = f"; if {texts[0]} holds it, set {mapping_hint(key, texts[0])}"
    elif used and texts:
        hint = f"; name its column, such as {mapping_hint(key, _likeliest(texts, row))}"
    return Refusal(
        Reason.MISSING_FIELD,
        f"{name} is missing; the row has {', '.join(columns) or 'no fields'}{hint}",
    )


def _likeliest(columns: Sequence[str], row: Mapping[str, Any]) -> str:
    """The column that most likely holds a text for people: the one with the most letters."""
    return max(columns, key=lambda column: len(str(row[column])))


def mapping_hint(name: str, column: str) -> str:
    """A `column_mapping` of one column as it is typed on the command line."""
    plain = _PLAIN_NAME.fullmatch(column) and column.lower() not in _YAML_WORDS
    return f"column_mapping={{{name}: {column if plain else json.dumps(column)}}}"


def decode_messages(row: dict[str, Any], answers: Sequence[str]) -> Refusal | None:
    """Replace texts that are lists of messages, in JSON or as Python prints them, in place.

    Args:
        row: columns by name.
        answers: columns of the answers, which are decoded both or not at all: one of two may well
            be a text about messages.
    """
    found = {
        name: _decoded(value)
        for name, value in row.items()
        if isinstance(value, str) and name in MESSAGE_COLUMNS and _LISTED.match(value)
    }
    decoded = {name: value for name, value in found.items() if _are_messages(value)}
    for name in found.keys() - decoded.keys():
        if name not in answers and _MESSAGES.match(row[name]):
            return Refusal(
                Reason.WRONG_TYPE,
                f"{name} is text that begins like a list of messages, but is not valid JSON",
            )
    texts = [n for n in answers if isinstance(row.get(n), str) and n not in decoded]
    row.update({n: value for n, value in decoded.items() if n not in answers or not texts})
    return None


def _decoded(text: str) -> Any:
    for decode in (json.loads, ast.literal_eval):
        try:
            found = decode(text.strip())
            return json.loads(found) if isinstance(found, str) else found
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def _are_messages(value: Any) -> bool:
    """Whether a decoded value is a message or a list of them, and not data of another kind."""
    parts = value if isinstance(value, list) else [value]
    return all(
        isinstance(part, dict)
        and str(part.get("role", part.get("from"))).strip().lower() in _ROLES
        and not {"content", "value", "tool_calls"}.isdisjoint(part)
        for part in parts
    )


def parse_content(row: Mapping[str, Any], name: str) -> Content | Refusal:
    """Parse a field as text, or as messages that each have a role and content."""
    value = row.get(name)
    if value is None:
        return missing_field(row, name)
    if isinstance(value, str):
        return value if _is_text(value) else _lone_surrogate(name)
    if isinstance(value, Mapping):
        value = _from_columns(value)
        if value is None:
            return Refusal(
                Reason.BAD_MESSAGE, f"the lists of {name} have different numbers of messages"
            )
    if not isinstance(value, list):
        return Refusal(Reason.WRONG_TYPE, f"{name} is a {type(value).__name__}, not text or a list")
    messages: list[Message] = []
    for index, message in enumerate(value):
        found = _message(f"{name}[{index}]", message)
        if isinstance(found, Refusal):
            return found
        if messages and _continues_calls(messages[-1], found):
            messages[-1] = {
                **messages[-1],
                "tool_calls": [*messages[-1]["tool_calls"], *found["tool_calls"]],
            }
        else:
            messages.append(found)
    return tuple(messages)


def _from_columns(value: Mapping[str, Any]) -> list[Any] | None:
    """A message as a list of one; `{role: [...], content: [...]}` as a list of messages.

    Older versions of `datasets` store lists of messages like that. None if their lengths differ.
    """
    columns = {name: part for name, part in value.items() if part is not None}
    if not isinstance(columns.get("role", columns.get("from")), list):
        return [value]
    lengths = {len(part) if isinstance(part, list) else -1 for part in columns.values()}
    if len(lengths) > 1:
        return None
    return [dict(zip(columns, parts, strict=True)) for parts in zip(*columns.values(), strict=True)]


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
    try:
        found.update(_tool_calls(found))
    except ValueError as error:
        return Refusal(Reason.BAD_MESSAGE, f"{place}.{error}")
    found.pop("function_call", None)
    if "content" not in found and found.get("tool_calls"):
        found["content"] = ""
    for key in ("role", "content"):
        if not isinstance(found.get(key), str):
            return Refusal(Reason.BAD_MESSAGE, f"{place} has no {key} that is text")
        if not _is_text(found[key]):
            return _lone_surrogate(f"{place}.{key}")
    return _with_role(place, found)


def _with_role(place: str, message: dict[str, Any]) -> Message | Refusal:
    role = message["role"].strip().lower()
    if role not in _ROLES:
        return Refusal(
            Reason.BAD_ROLE,
            f"{place} has the unknown role {message['role']!r}; known roles: {', '.join(_ROLES)}",
        )
    if role in _CALL_ROLES:
        calls = _calls_in_text(message["content"])
        if calls is None:
            return Refusal(
                Reason.BAD_MESSAGE,
                f"{place} has the role {role}, and its content is not a call in JSON with name and "
                "arguments",
            )
        message |= {"content": "", "tool_calls": calls}
    return message | {"role": role if role in OWN_ROLES else _ROLES[role]}


def _calls_in_text(text: str) -> list[Any] | None:
    """The tool calls that a message's content is, as JSON text of one or of a list."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    calls = found if isinstance(found, list) else [found]
    if not calls or any(not isinstance(call, dict) or "name" not in call for call in calls):
        return None
    return [_with_arguments({"type": "function", "function": call}) for call in calls]


def _continues_calls(before: Message, message: Message) -> bool:
    """Whether two messages of one assistant turn hold a tool call each and nothing else."""
    return all(
        part.get("tool_calls") and not part["content"] and role_of(part) == ASSISTANT
        for part in (before, message)
    )


def _tool_calls(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message's tool calls as a list of functions, with arguments as objects.

    OpenAI's older `function_call` is one of them; calls and arguments may be JSON text.

    Raises:
        ValueError: for what is not a tool call.
    """
    calls = message.get("tool_calls", message.get("function_call"))
    if calls is None:
        return {}
    calls = _json(calls) if isinstance(calls, str) else calls
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list):
        raise ValueError(f"tool_calls is a {type(calls).__name__}, not a list of calls")
    found = []
    for call in calls:
        call = _json(call) if isinstance(call, str) else call
        if not isinstance(call, Mapping):
            raise ValueError("tool_calls has an element that is not a call")
        is_bare = "function" not in call and "name" in call
        found.append(_with_arguments({"type": "function", "function": call} if is_bare else call))
    return {"tool_calls": found}


def _json(text: str) -> Any:
    """Decode JSON text; text of another kind is returned as it is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _with_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in call.items() if value is not None}
    if isinstance(found.get("function"), Mapping):
        return found | {"function": _with_arguments(found["function"])}
    if "arguments" not in found and isinstance(found.get("parameters"), str | dict):
        found["arguments"] = found.pop("parameters")  # as Llama 3 writes it
    text = found.get("arguments")
    if isinstance(text, str):
        values = _json(text) if text.strip() else {}
        if isinstance(values, str):  # encoded twice
            text, values = values, _json(values)
        if isinstance(values, dict) or values is None:
            return found | {"arguments": JsonObject(values or {}, text.strip() or "{}")}
    return found  # an answer may be the rejected one for arguments that are no JSON


def _join_parts(parts: Sequence[Any]) -> str | None:
    """Concatenate the text parts of a message's content; None if one is not text."""
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    return "".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else None


def without_nulls(value: Any) -> Any:
    """A copy of nested objects and lists without the fields that are null."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _lone_surrogate(name: str) -> Refusal:
    return Refusal(Reason.BAD_SURROGATE, f"{name} contains an unpaired surrogate")
