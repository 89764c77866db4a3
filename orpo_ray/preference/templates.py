"""Rendering pairs of messages as text with the chat template."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from orpo_ray.preference.errors import DataError
from orpo_ray.preference.fidelity import left_out
from orpo_ray.preference.messages import OWN_ROLES, JsonObject, role_of
from orpo_ray.preference.records import (
    ASSISTANT,
    SYSTEM,
    TOOL,
    Message,
    Note,
    Reason,
    Record,
    Refusal,
)
from orpo_ray.preference.rendering import (
    TooManyCharactersError,
    apply_template,
    reserved_argument,
)
from orpo_ray.preference.special_tokens import (
    closed_edges,
    has_open_edge,
    refuse_ids,
    special_names,
    special_tokens,
    without_last_end,
)

TEMPLATE_DATE = "2024-07-26"
"""Default date for templates that ask for today's: the one that Llama 3's falls back to."""
_CLOCK = "strftime_now"
_CLOCK_CALL = re.compile(_CLOCK + r"""\s*\(\s*(?:format\s*=\s*)?(["'])(.*?)\1\s*\)""")
_STANDARD = {"developer": SYSTEM, "ipython": TOOL, "function": TOOL, "model": ASSISTANT}


@dataclass(frozen=True)
class PairText:
    """A rendered pair; the model reads prompt + chosen and prompt + rejected.

    Args:
        prompt: text before the answers.
        chosen: the preferred answer, up to its end token where the template writes one.
        rejected: the other answer.
        is_chat: whether a chat template rendered it.
        notes: what is odd about the rendering.
    """

    prompt: str
    chosen: str
    rejected: str
    is_chat: bool = field(default=False, compare=False)
    notes: frozenset[Note] = field(default=frozenset(), compare=False)


def template_text(setting: str) -> str:
    """Return the chat template of a setting, which is a template itself or the path of one.

    Raises:
        DataError: if it has no `{`, as every template does, and no such file exists.
    """
    if "{" in setting:
        return setting
    path = Path(setting).expanduser()
    if not path.is_file():
        raise DataError([f"chat_template: {setting}: no such file, and not a Jinja template"])
    return path.read_text(encoding="utf-8")


def render(
    record: Record, tokenizer: Any, date: str = TEMPLATE_DATE, most_characters: int | None = None
) -> PairText | Refusal:
    """Render messages with the tokenizer's chat template; of text, only its end may be cut.

    The prompt includes the generation prompt. Where a template renders that differently once an
    answer follows, the prompt ends where the renderings begin to differ. An answer ends with the
    first end token after its text, or with its text; what a template writes after that is cut.

    Args:
        record: the pair.
        tokenizer: with the chat template.
        date: what templates that ask for today's date get, as YYYY-MM-DD.
        most_characters: that the template may make of a conversation; None for no limit.

    Raises:
        DataError: for messages, if the tokenizer has no chat template or one that does not end.
    """
    prompt, chosen, rejected = record.prompt, record.chosen, record.rejected
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        notes = record.notes | ({Note.TEMPLATE_UNUSED} if tokenizer.chat_template else set())
        chosen, rejected = (_without_space_after_end(s, tokenizer) for s in (chosen, rejected))
        return PairText(prompt, chosen, rejected, notes=frozenset(notes))
    if not tokenizer.chat_template:
        raise DataError(
            [
                "train_files: the pairs are messages, and the tokenizer has no chat template to "
                "render them with; give one as chat_template, use a chat model's tokenizer, or "
                "pairs of text (a column of questions is text as column_mapping={prompt: question})"
            ]
        )
    try:
        return _Rendering(record, tokenizer, date, most_characters).pair()
    except DataError:
        raise
    except TooManyCharactersError as error:
        return Refusal(
            Reason.TOO_LARGE,
            f"the chat template makes {error.n_characters} characters of it, more than "
            f"{most_characters}",
        )
    except Exception as error:
        # Templates raise on purpose, for roles that the model does not support, and by accident:
        # some add the arguments of a tool call to a text, and fail for an object.
        if any(_calls(record)):
            return render(_with_text_arguments(record), tokenizer, date, most_characters)
        return Refusal(Reason.TEMPLATE_REFUSED, f"the chat template raised: {error}")


def _without_space_after_end(answer: str, tokenizer: Any) -> str:
    """A text answer without the white space after the special token that ends it, if one does."""
    if not answer[-1:].isspace() and not answer.endswith(2 * tokenizer.eos_token):
        return answer
    stripped = answer.rstrip()
    if not stripped.endswith(special_names(tokenizer)):
        return answer
    eos = tokenizer.eos_token
    while stripped.endswith(eos) and stripped.removesuffix(eos).rstrip().endswith(eos):
        stripped = stripped.removesuffix(eos).rstrip()
    return stripped


class _Rendering:
    """One pair of messages and what the template makes of it."""

    def __init__(
        self, record: Record, tokenizer: Any, date: str, most_characters: int | None
    ) -> None:
        self.record, self.tokenizer, self.date = record, tokenizer, date
        self.most_characters = most_characters
        self.eos: str = tokenizer.eos_token
        self.arguments = dict(record.template)
        self.template = dated_template(tokenizer, date, record.template.get("tools"))
        self.prompt: tuple[Message, ...] = tuple(record.prompt)  # type: ignore[arg-type]
        sides = (record.chosen, record.rejected)
        self.answers = [without_last_end(side, self.eos) for side in sides]

    def pair(self) -> PairText | Refusal:
        wrong = reserved_argument(self.record.template, self.tokenizer)
        if wrong:
            return wrong
        asking = self._apply(self.prompt, answered=False) if self.prompt else ""
        wholes = [self._apply(_joined(self.prompt, side)) for side in self.answers]
        if any(
            call["arguments"] and str(dict(call["arguments"])) in whole
            for call in _calls(self.record)
            for whole in wholes
        ):
            # The template prints what it gets, which is meant to be text.
            texts = _with_text_arguments(self.record)
            return render(texts, self.tokenizer, self.date, self.most_characters)
        shared = shared_length(asking, *wholes)
        notes = set(self.record.notes)
        if shared < len(asking):
            asked = self._apply(self.prompt)
            if shared < shared_length(asking, asked):
                lost = asking[shared : shared + 40]
                return Refusal(
                    Reason.UNSTABLE_BORDER,
                    "the chat template renders the prompt differently before an answer, from "
                    f"{lost!r} on",
                )
            notes.add(Note.OPENING_CUT)
        cut = self._cut([whole[shared:] for whole in wholes], wholes, asking)
        if isinstance(cut, Refusal):
            return cut
        (chosen, rejected), asks_again = cut
        if asks_again:
            notes.add(Note.TEMPLATE_ASKS_AGAIN)
        text = PairText(wholes[0][:shared], chosen, rejected, is_chat=True)
        formed = self._formed_token(wholes) if has_open_edge(self.record, self.tokenizer) else None
        if formed:
            return refuse_ids("a message together with the text beside it", formed)
        notes.update(self._notes(text, asking))
        return PairText(text.prompt, chosen, rejected, is_chat=True, notes=frozenset(notes))

    def _apply(self, messages: Sequence[Message], answered: bool = True, **changes: Any) -> str:
        """Render one conversation; a prompt (not `answered`) ends where the answer is to begin.

        A prompt that ends with an assistant message is continued (prefill), any other is followed
        by the generation prompt.
        """
        open_turn = not answered and role_of(messages[-1]) == ASSISTANT
        return apply_template(
            self.tokenizer,
            [_with_known_role(message, self.tokenizer) for message in messages],
            self.most_characters,
            chat_template=self.template,
            add_generation_prompt=not answered and not open_turn,
            continue_final_message=open_turn,
            **(self.arguments | changes),
        )

    def _cut(
        self, answers: Sequence[str], wholes: Sequence[str], asking: str
    ) -> tuple[list[str], bool] | Refusal:
        """Cut what the template writes after the answers, and say if that is more than a space.

        Nothing is cut where it differs between the answers.
        """
        ends = []
        for index, (text, side) in enumerate(zip(answers, self.answers, strict=True)):
            start = 0
            if len(side) > 1:
                before = self._apply(_joined(self.prompt, side[:-1]))
                start = shared_length(before, wholes[index]) - len(wholes[index]) + len(text)
            content = side[-1]["content"].strip() if side else ""
            at = text.find(content, max(0, start)) if content else -1
            ends.append(at + len(content) if at >= 0 else max(0, start))
        tails = [text[end:] for text, end in zip(answers, ends, strict=True)]
        places = [tail.find(self.eos) for tail in tails]
        if min(places) >= 0:
            places = [place + len(self.eos) for place in places]
        elif tails[0] == tails[1]:
            mark = special_tokens(self.tokenizer).search(tails[0])
            if mark is None and tails[0].strip() and self._apply(self.prompt) == asking:
                return Refusal(
                    Reason.TEMPLATE_REFUSED,
                    "the chat template ignores add_generation_prompt: it asks for another answer "
                    "after each answer",
                )
            places = [mark.end() if mark else len(tails[0].rstrip())] * 2
        else:
            marks = [special_tokens(self.tokenizer).search(tail) for tail in tails]
            places = [mark.end() if mark else 0 for mark in marks]
            if not all(marks) or any(
                tail[n:].strip() for tail, n in zip(tails, places, strict=True)
            ):
                return list(answers), False
        rests = {tail[place:].strip() for tail, place in zip(tails, places, strict=True)}
        if len(rests) > 1:
            return list(answers), False
        cut = [text[: end + place] for text, end, place in zip(answers, ends, places, strict=True)]
        return cut, rests != {""}

    def _formed_token(self, wholes: Sequence[str]) -> str | None:
        """A special token that a text of the row forms together with what is beside it."""
        pattern, closed = special_tokens(self.tokenizer), closed_edges(self.prompt)
        for side, whole in zip(self.answers, wholes, strict=True):
            neutral = self._apply(
                _joined(closed, closed_edges(side)), **closed_edges(dict(self.record.template))
            )
            more = Counter(pattern.findall(whole)) - Counter(pattern.findall(neutral))
            if more:
                return str(next(iter(more)))
        return None

    def _notes(self, text: PairText, asking: str) -> set[Note]:
        """What the template leaves out, repeats or adds."""
        notes = set(left_out(self.prompt, text.prompt))
        for side, answer in zip(self.answers, (text.chosen, text.rejected), strict=True):
            notes.update(left_out(side, answer))
        template = _source(self.tokenizer)
        if any(name not in template for name in self.record.template if name != "tools"):
            notes.add(Note.DROPS_ARGUMENTS)
        if "tools" in self.record.template and self.prompt:
            bare = self._apply(self.prompt, answered=False, tools=None)
            notes |= {Note.DROPS_TOOLS} if bare == asking else set()
        if any(date in text.prompt for date in _written_dates(_source(self.tokenizer), self.date)):
            notes.add(Note.TEMPLATE_DATE)
        return notes


def _joined(prompt: Sequence[Message], answer: Sequence[Message]) -> tuple[Message, ...]:
    """One conversation, in which an answer continues the open assistant message of its prompt."""
    if prompt and answer and role_of(prompt[-1]) == role_of(answer[0]) == ASSISTANT:
        text = prompt[-1]["content"] + answer[0]["content"]
        return (*prompt[:-1], {**prompt[-1], **answer[0], "content": text}, *answer[1:])
    return (*prompt, *answer)


def shared_length(*sequences: Sequence[Any]) -> int:
    """Return the length of the longest common prefix, by binary search over slices."""
    first, *others = sequences
    shared, most = 0, min(map(len, sequences))
    while shared < most:
        middle = (shared + most + 1) // 2
        part = first[shared:middle]
        if all(other[shared:middle] == part for other in others):
            shared = middle
        else:
            most = middle - 1
    return shared


def uses_clock(tokenizer: Any) -> bool:
    """Whether the tokenizer's chat template asks for the current date."""
    return _CLOCK in _source(tokenizer)


def dated_template(tokenizer: Any, date: str, tools: Any = None) -> str | None:
    """The chat template with a date in place of its calls for today's; None if it has none.

    Args:
        tokenizer: with the chat template.
        date: YYYY-MM-DD.
        tools: of the conversation, which may have a template of their own.
    """
    if not uses_clock(tokenizer):
        return None
    template: str = tokenizer.get_chat_template(None, tools)
    return _with_date(template, date)


@lru_cache(maxsize=8)
def _written_dates(template: str, date: str) -> tuple[str, ...]:
    """A date in each form in which a template writes today's."""
    today = datetime.fromisoformat(date)
    return tuple(today.strftime(found[2]) for found in _CLOCK_CALL.finditer(template))


@lru_cache(maxsize=8)
def _with_date(template: str, date: str) -> str:
    today = datetime.fromisoformat(date)
    dated = _CLOCK_CALL.sub(lambda found: repr(today.strftime(found[2])), template)
    if re.search(_CLOCK + r"\s*\(", dated):
        raise DataError(
            [
                "chat_template: the template asks for today's date in a form that is no literal, "
                "so that tokens would depend on the day; write strftime_now('...') in it"
            ]
        )
    return dated


def _source(tokenizer: Any) -> str:
    """The text of the chat template, or of all of them where there are several."""
    return str(tokenizer.chat_template)


def _with_known_role(message: Message, tokenizer: Any) -> Message:
    """The message with the standard role where the template does not know the one it has."""
    role = message["role"]
    if role not in OWN_ROLES or any(f"{q}{role}{q}" in _source(tokenizer) for q in "'\""):
        return message
    return {**message, "role": _STANDARD[role]}


def _calls(record: Record) -> Iterator[Mapping[str, Any]]:
    """Yield the functions of all tool calls with arguments that are an object."""
    for messages in (record.prompt, record.chosen, record.rejected):
        for message in messages if isinstance(messages, tuple) else ():
            for call in message.get("tool_calls") or ():
                function = call.get("function", call)
                if isinstance(function, Mapping) and isinstance(function.get("arguments"), dict):
                    yield function


def _with_text_arguments(record: Record) -> Record:
    """The record with the arguments of its tool calls as JSON text."""

    def as_text(value: Any, key: str = "") -> Any:
        if key == "arguments" and isinstance(value, dict):
            return value.text if isinstance(value, JsonObject) else json.dumps(value)
        if isinstance(value, Mapping):
            return {name: as_text(part, name) for name, part in value.items()}
        return [as_text(part) for part in value] if isinstance(value, list) else value

    sides: dict[str, Any] = {
        name: tuple(
            {**message, "tool_calls": as_text(message["tool_calls"])}
            if message.get("tool_calls")
            else message
            for message in getattr(record, name)
        )
        for name in ("prompt", "chosen", "rejected")
    }
    return replace(record, **sides)


def empty_answer(text: PairText, tokenizer: Any) -> Refusal | None:
    """Refuse a pair if an answer has no text besides special tokens."""
    for name, reason in (("chosen", Reason.EMPTY_CHOSEN), ("rejected", Reason.EMPTY_REJECTED)):
        answer: str = getattr(text, name)
        # Most answers are longer than all special tokens that could stand in one without text.
        if len(answer) < 100 and not special_tokens(tokenizer).sub("", answer).strip():
            if Note.DROPS_CALLS in text.notes:
                return Refusal(reason, f"{name} is a tool call, which the chat template leaves out")
            return Refusal(reason, f"{name} has no text before its end-of-sequence token")
    return None
