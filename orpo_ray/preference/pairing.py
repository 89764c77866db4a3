"""Making a pair of a prompt and two answers: where the prompt ends, and what it may hold."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from orpo_ray.preference.messages import missing_field, parse_content, role_of
from orpo_ray.preference.records import (
    ASSISTANT,
    SYSTEM,
    USER,
    Content,
    Message,
    Note,
    Reason,
    Record,
    Refusal,
)

_LAST_TURN = "\n\nAssistant:"
_SIDES = ("chosen", "rejected")
_EMPTY = {"chosen": Reason.EMPTY_CHOSEN, "rejected": Reason.EMPTY_REJECTED}
_COPY, _SHORT_COPY = 24, 6  # characters
_MISSING_WORDS = frozenset(
    {
        *("nan", "-nan", "none", "null", "(null)", "na", "n/a", "#n/a", "#na", "<na>", "nat"),
        *("undefined", "\\n", "[]", "{}"),
    }
)
# What stands before the user's text in a rendered prompt: a header that ends in a mark.
_HEAD = re.compile(
    r"(?:(?:[#<\[|]|Human:|User:|USER:|Q:|Question:)[^\n]{0,80}?[:>\]|] ?)|Human: |User: "
)
Messages = tuple[Message, ...]


def normalise(row: Mapping[str, Any]) -> Record | Refusal:
    """Read a row with the columns chosen, rejected and, optionally, prompt."""
    fields: dict[str, Content] = {}
    for name in ("prompt", *_SIDES):
        if name == "prompt" and row.get(name) is None:
            continue
        content = parse_content(row, name)
        if isinstance(content, Refusal):
            return content
        fields[name] = content
    found = make_pair(fields.get("prompt"), fields["chosen"], fields["rejected"])
    if isinstance(found, Refusal) and found.reason is Reason.MISSING_FIELD and "prompt" in row:
        return missing_field(row, "prompt")
    return found


def make_pair(
    prompt: Content | None, chosen: Content, rejected: Content, is_alone: bool = False
) -> Record | Refusal:
    """Make a pair of what a row has, and refuse it where no reading is certain.

    Texts stay texts where all parts are texts; otherwise a text prompt is the user's message and a
    text answer the assistant's. Without a prompt, text dialogues are split after their last
    `Assistant:` (hh-rlhf), and lists of messages before their last message, which both answers must
    share. Messages of the prompt that the answers repeat are taken off them.

    Args:
        prompt: None if the row has no prompt of its own.
        chosen: the preferred answer, or the whole conversation that ends with it.
        rejected: the other one.
        is_alone: whether the row has the chosen answer alone, which is then both.
    """
    if isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(prompt, tuple):
        found = _pair_of_texts(prompt, chosen, rejected)
    else:
        found = _pair_of_messages(prompt, chosen, rejected)
    return found if isinstance(found, Refusal) else check_record(found, is_alone)


def has_dialogues(chosen: Content, rejected: Content) -> bool:
    """Whether the answers hold their prompts: conversations, or texts with an `Assistant:` turn."""
    return any(
        _LAST_TURN in side if isinstance(side, str) else bool(side) and _n_before_answer(side) > 0
        for side in (chosen, rejected)
    )


def _pair_of_texts(prompt: str | None, chosen: str, rejected: str) -> Record | Refusal:
    if prompt is None:
        return _split_dialogues(chosen, rejected)
    if prompt.strip() and _LAST_TURN in chosen and _LAST_TURN in rejected:
        split = _split_dialogues(chosen, rejected)
        if isinstance(split, Record) and prompt.strip() in str(split.prompt):
            return split
    copies = [_begins_with(prompt, side) for side in (chosen, rejected)]
    if all(copies):
        return Refusal(
            Reason.PROMPT_REPEATED,
            "chosen and rejected begin with the prompt, which would be trained twice; remove it "
            "from the answers",
        )
    notes = {Note.ONE_REPEATS} if any(copies) else set()
    notes |= set() if prompt.strip() else {Note.EMPTY_PROMPT}
    return Record(prompt, chosen, rejected, notes=frozenset(notes))


def _begins_with(prompt: str, answer: str) -> bool:
    """Whether an answer begins with a copy of its prompt, perhaps after the head of a template.

    Forms of white space are the same. A prompt of a few words is no copy unless it is a question or
    has a form: two answers to "Good morning!" may well begin with it.
    """
    copy = prompt.strip()
    if not copy or copy.split(maxsplit=1)[0] not in answer:
        return False
    is_form = len(copy) >= _SHORT_COPY and (copy.endswith(("?", ":")) or "\n" in copy)
    if len(copy) < (_COPY if copy.isascii() else _COPY // 2) and not is_form:
        return False
    if copy.isascii() and len(copy.split()) < 2:
        return False
    copy, text = " ".join(copy.split()), " ".join(answer[: 3 * len(prompt) + 200].split())
    start = 0 if text.startswith(copy) else text.find(copy)
    if start < 0 or (start and not _HEAD.fullmatch(text[:start])):
        return False
    end = start + len(copy)
    return not (copy[-1].isalnum() and text[end : end + 1].isalnum())


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


def as_messages(content: Content, role: str) -> Messages:
    """Messages as they are, and a text as one message of a role."""
    return ({"role": role, "content": content},) if isinstance(content, str) else content


def _pair_of_messages(
    prompt: Content | None, chosen: Content, rejected: Content
) -> Record | Refusal:
    answers = [as_messages(side, ASSISTANT) for side in (chosen, rejected)]
    for name, answer in zip(_SIDES, answers, strict=True):
        if answer and role_of(answer[-1]) != ASSISTANT:
            return Refusal(
                Reason.NOT_AN_ANSWER, f"the last message of {name} has a role other than assistant"
            )
    if isinstance(prompt, str) and _in_both(prompt, answers):
        prompt = None  # the conversations hold it, and perhaps a system message before it
    explicit = prompt is not None
    blank = not prompt or (isinstance(prompt, str) and not prompt.strip())
    asked = () if blank or prompt is None else as_messages(prompt, USER)
    if all(role_of(message) == SYSTEM for message in asked):
        return _split_conversations(asked, answers, explicit)
    notes: set[Note] = set()
    for index, answer in enumerate(answers):
        rest = _after_prompt(asked, answer)
        if rest is not None:
            answers[index] = rest
            notes.add(Note.PROMPT_REPEATED)
    heads = [answer[: _n_before_answer(answer)] for answer in answers]
    if heads[0] and heads[0] == heads[1] and role_of(asked[-1]) == ASSISTANT:
        asked += heads[0]  # a conversation that both answers continue
        answers = [answer[len(heads[0]) :] for answer in answers]
    elif heads[0] or heads[1]:
        side = 0 if heads[0] else 1
        role = role_of(heads[side][0])
        return Refusal(
            Reason.PROMPT_NOT_SHARED,
            f"{_SIDES[side]} begins with a message of the role {role}, which is not the prompt's: "
            "it neither repeats the prompt nor answers it",
        )
    elif role_of(asked[-1]) == USER and all(
        _begins_with(asked[-1]["content"], answer[0]["content"]) for answer in answers if answer
    ):
        return Refusal(
            Reason.PROMPT_REPEATED,
            "chosen and rejected begin with the user's message, which would be trained twice; "
            "remove it from the answers",
        )
    if role_of(asked[-1]) == ASSISTANT:
        answers, copied = _after_prefill(asked[-1]["content"], answers)
        notes |= {Note.PROMPT_REPEATED} if copied else set()
    return Record(asked, answers[0], answers[1], notes=frozenset(notes))


def _in_both(prompt: str, answers: Sequence[Messages]) -> bool:
    """Whether a text prompt is a message of both conversations, before their answers."""
    text = prompt.strip()
    return bool(text) and all(
        any(message["content"].strip() == text for message in answer[:-1]) for answer in answers
    )


def _n_before_answer(messages: Messages) -> int:
    """Number of messages before the first of the assistant."""
    roles = map(role_of, messages)
    return next((i for i, role in enumerate(roles) if role == ASSISTANT), len(messages))


def _split_conversations(
    system: Messages, answers: Sequence[Messages], explicit: bool
) -> Record | Refusal:
    """Split two conversations before their last message, after system messages beside them."""
    for name, answer in zip(_SIDES, answers, strict=True):
        if not answer:
            return Refusal(_EMPTY[name], f"{name} has no messages")
    chosen, rejected = answers
    if all(_n_before_answer(answer) == 0 for answer in answers):
        if system:
            return Record(system, chosen, rejected)
        return Refusal(
            Reason.MISSING_FIELD,
            f"prompt is {'empty' if explicit else 'missing'}: chosen and rejected are messages of "
            "the assistant alone",
        )
    if chosen[:-1] != rejected[:-1]:
        return Refusal(
            Reason.PROMPT_NOT_SHARED, "chosen and rejected differ before their last message"
        )
    before = chosen[:-1]
    if before[: len(system)] != system:
        before = system + before
    return Record(before, chosen[-1:], rejected[-1:])


def _after_prompt(prompt: Messages, answer: Messages) -> Messages | None:
    """The answer after a copy of its prompt, with or without the system messages; else None."""
    bare = tuple(message for message in prompt if role_of(message) != SYSTEM)
    n_system = next((i for i, m in enumerate(answer) if role_of(m) != SYSTEM), len(answer))
    for copy, text in ((prompt, answer), (bare, answer), (bare, answer[n_system:])):
        if len(text) > len(copy) and all(map(_same, copy, text)):
            return text[len(copy) :]
    return None


def _same(one: Message, other: Message) -> bool:
    """Whether two messages say the same, white space around them aside."""
    return (
        role_of(one) == role_of(other)
        and one["content"].strip() == other["content"].strip()
        and one.get("tool_calls") == other.get("tool_calls")
    )


def _after_prefill(start: str, answers: Sequence[Messages]) -> tuple[list[Messages], bool]:
    """The answers without a copy of the open message that they continue."""
    begin = start.strip()
    texts = [answer[0]["content"] if answer else "" for answer in answers]
    if not begin or not all(text.lstrip().startswith(begin) for text in texts):
        return list(answers), False
    found = []
    for text, (first, *others) in zip(texts, answers, strict=True):
        rest = text.lstrip()[len(begin) :]
        if start != start.rstrip():
            rest = rest.lstrip()
        found.append(({**first, "content": rest}, *others))
    return found, True


def check_record(record: Record, is_alone: bool = False) -> Record | Refusal:
    """Refuse empty or identical answers, and messages whose roles are out of order."""
    for name in _SIDES:
        answer = getattr(record, name)
        if isinstance(answer, tuple):
            wrong = _turn_order_error((*record.prompt, *answer), len(record.prompt))
            if wrong:
                return Refusal(Reason.BAD_ROLE, wrong)
            calls = any(message.get("tool_calls") for message in answer)
            answer = "".join(message["content"] for message in answer) or "call" * calls
        if not answer.strip():
            return Refusal(_EMPTY[name], f"{name} has no text")
    if record.chosen == record.rejected and not is_alone:
        return Refusal(Reason.IDENTICAL_ANSWERS, "chosen and rejected are the same")
    parts = (record.prompt, record.chosen, record.rejected)
    texts = (
        text
        for part in parts
        for text in ((part,) if isinstance(part, str) else (m["content"] for m in part))
    )
    if any(map(is_missing_word, texts)):
        notes = record.notes | {Note.MISSING_WORD}
        return Record(record.prompt, record.chosen, record.rejected, record.template, notes)
    return record


def is_missing_word(text: str) -> bool:
    """Whether a text is only a word that tables have for a missing value."""
    return len(text) < 20 and text.strip().lower() in _MISSING_WORDS


def _turn_order_error(messages: Sequence[Any], n_prompt: int) -> str | None:
    """Describe the first message whose role is out of order, or return None.

    An answer may continue the last message of the prompt: there, two of the assistant are in order.
    """
    before = None
    for index, message in enumerate(messages):
        role = role_of(message)
        if role == SYSTEM and before not in (None, SYSTEM):
            return f"message {index + 1} has the role system, but comes after {before}"
        continues = index == n_prompt and not messages[index - 1].get("tool_calls")
        if role == before and role in (USER, ASSISTANT) and not (role == ASSISTANT and continues):
            return f"messages {index} and {index + 1} both have the role {role}"
        before = role
    return None
