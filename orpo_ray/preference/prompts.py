"""Finding the prompt of a row with two answers: beside them or in them."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orpo_ray.preference.layouts import CONVERSATIONS, INPUTS, QUESTIONS, SIDES, SYSTEMS, Shape
from orpo_ray.preference.messages import parse_content, role_of
from orpo_ray.preference.pairing import as_messages, has_dialogues, is_missing_word
from orpo_ray.preference.records import (
    ASSISTANT,
    SYSTEM,
    USER,
    Content,
    Message,
    Reason,
    Refusal,
)


@dataclass(frozen=True)
class Fields:
    """The parts of a row once its shape is known.

    Args:
        shape: the layout.
        used: columns that the parts come from.
        prompt: None if the row has none of its own.
        chosen: the preferred answer, or the conversation that ends with it.
        rejected: the other one.
    """

    shape: Shape
    used: frozenset[str]
    prompt: Content | None
    chosen: Content
    rejected: Content


def find_fields(row: Mapping[str, Any]) -> Fields | Refusal:
    """Find the prompt of a row with chosen and rejected: beside them, or in them."""
    sides = []
    for name in SIDES:
        side = parse_content(row, name)
        if isinstance(side, Refusal):
            return side
        sides.append(side)
    chosen, rejected = sides
    texts = isinstance(chosen, str) and isinstance(rejected, str)
    used = {"prompt", *SIDES}
    prompt: Content | None = None
    if row.get("prompt") is not None:
        parsed = parse_content(row, "prompt")
        if isinstance(parsed, Refusal):
            return parsed
        prompt = parsed
    shape, system = _shape(prompt, texts), _system_alone(prompt)
    has_prompt = prompt is not None and bool(
        prompt.strip() if isinstance(prompt, str) else len(prompt) > len(system)
    )
    if not has_prompt and not has_dialogues(chosen, rejected):
        beside = prompt_beside(row)
        if isinstance(beside, Refusal):
            return beside
        if beside is not None:
            shape, names, prompt = beside
            used |= names
            if isinstance(prompt, tuple) and system:
                prompt = system + prompt
    elif has_prompt and texts and system_text(row):
        shape = Shape.QUESTION
    if system_text(row) and shape not in (Shape.TEXT, Shape.DIALOGUES):
        prompt = with_system(row, prompt, (chosen, rejected))
        used |= set(SYSTEMS)
    if isinstance(prompt, tuple) and shape in (Shape.BESIDE, Shape.SHAREGPT):
        kept = _without_answer(prompt, as_messages(chosen, ASSISTANT))
        if isinstance(kept, Refusal):
            return kept
        prompt = kept
    return Fields(shape, frozenset(used), prompt, chosen, rejected)


def _system_alone(prompt: Content | None) -> tuple[Message, ...]:
    """The messages of a prompt that are of the system, if all of them are."""
    if not isinstance(prompt, tuple) or any(role_of(message) != SYSTEM for message in prompt):
        return ()
    return prompt


def _shape(prompt: Content | None, texts: bool) -> Shape:
    if texts and not isinstance(prompt, tuple):
        return Shape.DIALOGUES if prompt is None else Shape.TEXT
    if prompt is None:
        return Shape.CONVERSATIONS
    return Shape.PROMPTED if isinstance(prompt, str) else Shape.MESSAGES


def prompt_beside(row: Mapping[str, Any]) -> tuple[Shape, set[str], Content] | Refusal | None:
    """The prompt of a row whose answers are alone, from the columns that may hold it."""
    for name in CONVERSATIONS:
        value = row.get(name)
        if value and _is_turns(value):
            parsed = parse_content(row, name)
            if isinstance(parsed, Refusal):
                return parsed
            shape = Shape.SHAREGPT if name == "conversations" else Shape.BESIDE
            return shape, {name}, parsed
    question = next((n for n in QUESTIONS if isinstance(row.get(n), str) and row[n].strip()), None)
    given = next((n for n in INPUTS if isinstance(row.get(n), str)), None)
    if question is None:
        texts = (given, "history") if given else ("history",)
        question = next((n for n in texts if n and isinstance(row.get(n), str) and row[n]), None)
        given = None
        if question is None:
            return None
    used = {question}
    turns: list[Message] = []
    if "history" in row and question != "history":
        pairs = _history(row["history"])
        if isinstance(pairs, Refusal):
            return pairs
        turns += pairs
        used.add("history")
    asked = row[question]
    for name in INPUTS[:1]:
        if row.get(name) is not None and not isinstance(row[name], str):
            return Refusal(Reason.WRONG_TYPE, f"{name} is not text")
    if given is not None:
        missing = is_missing_word(row[given])
        asked = "\n\n".join(filter(None, [asked, "" if missing else row[given]]))
        used.add(given)
    parsed = parse_content({question: asked}, question)
    if isinstance(parsed, Refusal):
        return parsed
    alpaca = question == "instruction"
    turns.append({"role": USER, "content": parsed})
    return (Shape.ALPACA if alpaca else Shape.QUESTION), used, tuple(turns)


def _is_turns(value: Any) -> bool:
    """Whether a value is a list of messages, or a message or lists of their parts."""
    if isinstance(value, list):
        return all(isinstance(turn, Mapping) for turn in value)
    return isinstance(value, Mapping) and not {"role", "from"}.isdisjoint(value)


def _history(turns: Any) -> list[Message] | Refusal:
    """Messages of Alpaca's `history`, a list of [question, answer], also as JSON text."""
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            turns = json.loads(turns)
    turns = turns or []
    if not isinstance(turns, list) or any(not isinstance(t, list) or len(t) != 2 for t in turns):
        return Refusal(Reason.WRONG_TYPE, "history is not a list of [question, answer]")
    found: list[Message] = []
    for turn in turns:
        parsed = [parse_content({"history": text}, "history") for text in turn]
        for role, text in zip((USER, ASSISTANT), parsed, strict=True):
            if isinstance(text, Refusal):
                return text
            found.append({"role": role, "content": text})
    return found


def system_text(row: Mapping[str, Any]) -> str:
    """The system message that stands in a column of its own, if any."""
    texts = (row[name] for name in SYSTEMS if isinstance(row.get(name), str))
    return next((text for text in texts if text.strip()), "")


def with_system(
    row: Mapping[str, Any], prompt: Content | None, answers: Sequence[Content] = ()
) -> Content | None:
    """The prompt as messages, after the row's system message unless there is one.

    Args:
        row: has the system message in a column of its own.
        prompt: None if the answers are conversations that hold it.
        answers: the answers, which may begin with a system message.
    """
    asked = as_messages(prompt, USER) if prompt else ()
    for messages in (asked, *answers):
        if isinstance(messages, tuple) and messages and role_of(messages[0]) == SYSTEM:
            return prompt if prompt is None else asked
    return ({"role": SYSTEM, "content": system_text(row)}, *asked)


def _without_answer(
    prompt: tuple[Message, ...], chosen: tuple[Message, ...]
) -> tuple[Message, ...] | Refusal:
    """Messages beside two answers without the chosen answer, with which some data sets end them."""
    if not prompt or role_of(prompt[-1]) != ASSISTANT or len(prompt) == 1:
        return prompt
    if chosen and prompt[-1]["content"].strip() == chosen[-1]["content"].strip():
        return prompt[:-1]
    return Refusal(
        Reason.BAD_ROLE,
        "the messages beside chosen and rejected end with another answer of the assistant",
    )
