"""Comparing messages with their rendering: what a chat template leaves out or repeats."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orpo_ray.preference.messages import role_of
from orpo_ray.preference.records import ASSISTANT, SYSTEM, TOOL, USER, Message, Note

_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_DROPS = {
    SYSTEM: Note.DROPS_SYSTEM,
    USER: Note.DROPS_USER,
    ASSISTANT: Note.DROPS_ASSISTANT,
    TOOL: Note.DROPS_TOOL,
}
_TAGGED = re.compile(r"<(think|thinking|reasoning)>(.*?)</\1>", re.DOTALL)
# A shorter text may well stand twice in what a template writes itself.
_REPEATED_CHARACTERS = 24
_COMPARED_MESSAGES = 16


def left_out(messages: Sequence[Message], rendered: str) -> Iterator[Note]:
    """Yield what of some messages is not in their rendering, or is in it more than once.

    White space around a text or a line does not count, and a text may be written as JSON.
    """
    for message in messages:
        content = message["content"].strip()
        if content and content not in rendered:
            yield from _missing_text(message, content, rendered)
        elif content and len(messages) <= _COMPARED_MESSAGES:
            own = sum(other["content"].count(content) for other in messages)
            times = rendered.count(content)
            if times < own:  # it was found in another message
                yield _DROPS[role_of(message)]
            elif times > own and len(content) >= _REPEATED_CHARACTERS:
                yield Note.TEMPLATE_REPEATS
        for key in _THOUGHTS:
            thought = message.get(key)
            if isinstance(thought, str) and not _is_in(thought, rendered):
                yield Note.DROPS_THOUGHTS
        if not all(_has_call(call, rendered) for call in message.get("tool_calls") or ()):
            yield Note.DROPS_CALLS


def _missing_text(message: Message, content: str, rendered: str) -> Iterator[Note]:
    if _is_in(content, rendered):
        return
    bare = _TAGGED.sub("\n", content)
    if bare == content and "</think>" in content:  # opened in the generation prompt
        bare = content.partition("</think>")[2]
    if bare == content or not _is_in(bare, rendered):
        yield _DROPS[role_of(message)]
        return
    thoughts = [found[1] for found in _TAGGED.findall(content)]
    thoughts = thoughts or [content.partition("</think>")[0]]
    if not all(_is_in(thought, rendered) for thought in thoughts):
        yield Note.DROPS_THOUGHTS


def _is_in(text: str, rendered: str) -> bool:
    """Whether a text was rendered: as it is, as JSON, or line by line."""
    text = text.strip()
    if text in rendered or json.dumps(text, ensure_ascii=False)[1:-1] in rendered:
        return True
    if json.dumps(text)[1:-1] in rendered:
        return True
    return "\n" in text and all(line.strip() in rendered for line in text.splitlines())


def _has_call(call: Any, rendered: str) -> bool:
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    if not isinstance(function, Mapping):
        return True
    texts = [function.get("name"), *_leaves(function.get("arguments"))]
    return all(_is_in(text, rendered) for text in texts if isinstance(text, str))


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the values in nested objects and lists."""
    if isinstance(value, Mapping):
        for part in value.values():
            yield from _leaves(part)
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(part)
    else:
        yield value
