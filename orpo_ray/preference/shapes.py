"""The layouts of columns (shapes) in which preference data comes, each read as pairs."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as with_fields
from enum import StrEnum
from itertools import combinations
from typing import Any

from orpo_ray.preference.records import (
    ASSISTANT,
    USER,
    Content,
    Message,
    Reason,
    Record,
    Refusal,
    check_record,
    missing_field,
    normalise,
    parse_content,
)

_ANSWERS = ("completions", "responses", "answers")
_SCORES = ("scores", "ratings")
_PROMPTS = ("prompt", "instruction", "question")
_ANSWER_TEXTS = ("text", "content", "response", "answer", "completion")
_ANSWER_SCORES = ("score", "rating", "overall_score")
_ALPACA_TARGETS = ("chosen", "rejected")


class Shape(StrEnum):
    """Layout of a row's columns; the values are the names in reports."""

    TEXT = "texts (prompt, chosen, rejected)"
    DIALOGUES = "dialogues in text (chosen, rejected)"
    MESSAGES = "messages (prompt, chosen, rejected)"
    CONVERSATIONS = "messages (chosen, rejected)"
    PROMPTED = "messages (chosen, rejected) with the prompt beside them"
    SHAREGPT = "ShareGPT turns (conversations, chosen, rejected)"
    ALPACA = "Alpaca (instruction, input, chosen, rejected)"
    RANKING = "rankings (one prompt, scored answers)"


@dataclass(frozen=True)
class ParsedRow:
    """The pairs read from one row.

    Args:
        shape: layout that was detected.
        records: one pair, or all pairs of a ranking.
        ignored: columns that were not read.
        left_out: number of pairs of a ranking skipped for equal answers or close scores.
    """

    shape: Shape
    records: tuple[Record, ...]
    ignored: frozenset[str] = frozenset()
    left_out: int = 0


@dataclass(frozen=True)
class RowReader:
    """Reads rows as pairs, detecting the shape of each row from its columns.

    Args:
        column_mapping: (expected name, column in the data) where the two differ.
        min_score_gap: minimum chosen score minus rejected score, for pairs that have scores.
    """

    column_mapping: tuple[tuple[str, str], ...] = ()
    min_score_gap: float | None = None

    def read(self, row: Mapping[str, Any]) -> ParsedRow | Refusal:
        """Read the pairs of one row, or refuse it."""
        for _, column in self.column_mapping:
            if column not in row:
                return missing_field(row, column)
        named = row
        if self.column_mapping:
            taken = {column for _, column in self.column_mapping}
            named = {name: value for name, value in row.items() if name not in taken}
            named |= {name: row[column] for name, column in self.column_mapping}
        shape, used = _detect_shape(named)
        template = _template_arguments(named)
        if isinstance(template, Refusal):
            return template
        result = self._ranking(named) if shape is Shape.RANKING else self._pair(shape, named)
        if isinstance(result, Refusal):
            return result
        used |= {"tools", "chat_template_kwargs", "score_chosen", "score_rejected"}
        records = result.records
        if template:
            records = tuple(with_fields(record, template=template) for record in records)
        ignored = frozenset(map(str, named.keys() - used))
        return ParsedRow(shape, records, ignored, result.left_out)

    def _pair(self, shape: Shape, row: Mapping[str, Any]) -> ParsedRow | Refusal:
        scores = [row.get("score_chosen"), row.get("score_rejected")]
        if None not in scores:
            problem = self._bad_scores(scores)
            if problem:
                return problem
        reshaped = _RESHAPE[shape](row) if shape in _RESHAPE else row
        if isinstance(reshaped, Refusal):
            return reshaped
        record = normalise(reshaped)
        return record if isinstance(record, Refusal) else ParsedRow(shape, (record,))

    def _bad_scores(self, scores: Sequence[Any]) -> Refusal | None:
        numbers = [_number(score) for score in scores]
        if None in numbers:
            return Refusal(Reason.BAD_SCORE, f"scores {scores} are not two numbers")
        gap = float(numbers[0] or 0) - float(numbers[1] or 0)
        if self.min_score_gap is not None and gap < self.min_score_gap:
            return Refusal(
                Reason.SCORE_GAP,
                f"score_chosen - score_rejected is {gap:g}, less than min_score_gap",
            )
        return None

    def _ranking(self, row: Mapping[str, Any]) -> ParsedRow | Refusal:
        """Pair every two answers whose scores differ enough; the higher score is chosen."""
        name = next(name for name in _ANSWERS if isinstance(row.get(name), list))
        scored = _scored_answers(name, row)
        if isinstance(scored, Refusal):
            return scored
        prompt = next((key for key in _PROMPTS if row.get(key) is not None), "prompt")
        asked = parse_content(row, prompt)
        if isinstance(asked, Refusal):
            return asked
        records, left_out, too_near = [], 0, False
        problem: Refusal | None = None
        for (one, first), (other, second) in combinations(scored, 2):
            better, worse = (one, other) if first > second else (other, one)
            if first == second or abs(first - second) < (self.min_score_gap or 0.0):
                left_out += 1
                too_near |= first != second
                continue
            chosen: Content = better if isinstance(asked, str) else tuple(_answer(better))
            rejected: Content = worse if isinstance(asked, str) else tuple(_answer(worse))
            record = check_record(Record(asked, chosen, rejected))
            if isinstance(record, Refusal):
                left_out += 1
                problem = problem or record
            else:
                records.append(record)
        if not records:
            reason = Reason.SCORE_GAP if too_near else Reason.BAD_SCORE
            none = Refusal(reason, f"no two of {len(scored)} {name} differ enough in their scores")
            return problem or none
        return ParsedRow(Shape.RANKING, tuple(records), left_out=left_out)


def _detect_shape(row: Mapping[str, Any]) -> tuple[Shape, set[str]]:
    """Detect the shape from the columns; also return the columns that it reads."""
    used = {"prompt", "chosen", "rejected"}
    if "chosen" not in row and any(isinstance(row.get(name), list) for name in _ANSWERS):
        return Shape.RANKING, {*_ANSWERS, *_SCORES, *_PROMPTS}
    if isinstance(row.get("conversations"), list):
        return Shape.SHAREGPT, {"conversations", "chosen", "rejected", "system"}
    if "prompt" not in row and isinstance(row.get("instruction"), str):
        return Shape.ALPACA, {"instruction", "input", "system", "history", *_ALPACA_TARGETS}
    sides = [row.get("chosen"), row.get("rejected")]
    if all(isinstance(side, str) for side in sides):
        return (Shape.TEXT if "prompt" in row else Shape.DIALOGUES), used
    if "prompt" not in row:
        return Shape.CONVERSATIONS, used
    whole = all(isinstance(side, list) and len(side) > 1 for side in sides)
    if isinstance(row["prompt"], str) and whole:
        return Shape.PROMPTED, used
    return Shape.MESSAGES, used


def _sharegpt(row: Mapping[str, Any]) -> dict[str, Any]:
    """Use `conversations`, after the system message, as the prompt."""
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return dict(row) | {"prompt": [*system, *row["conversations"]]}


def _alpaca(row: Mapping[str, Any]) -> dict[str, Any] | Refusal:
    """Build messages: system, history, then the instruction and its input as one user message."""
    messages: list[Message] = []
    if row.get("system"):
        messages.append({"role": "system", "content": row["system"]})
    turns = row.get("history") or []
    if not isinstance(turns, list) or any(not isinstance(t, list) or len(t) != 2 for t in turns):
        return Refusal(Reason.WRONG_TYPE, "history is not a list of [question, answer]")
    for question, answer in turns:
        messages += [{"role": USER, "content": question}, {"role": ASSISTANT, "content": answer}]
    if not isinstance(row.get("input") or "", str):
        return Refusal(Reason.WRONG_TYPE, "input is not text")
    asked = "\n\n".join(filter(None, [row["instruction"], row.get("input")]))
    messages.append({"role": USER, "content": asked})
    sides = {
        name: _answer(row[name]) if isinstance(row.get(name), str) else row.get(name)
        for name in _ALPACA_TARGETS
        if name in row
    }
    return {"prompt": messages} | sides


def _prompted(row: Mapping[str, Any]) -> dict[str, Any]:
    """Drop a prompt that repeats a message of both answers."""
    inside = all(
        any(isinstance(turn, Mapping) and row["prompt"] in turn.values() for turn in row[name])
        for name in _ALPACA_TARGETS
    )
    if not inside:
        return dict(row)  # text mixed with messages: refused later as MIXED_TYPES
    return {name: row[name] for name in _ALPACA_TARGETS}


_RESHAPE: dict[Shape, Callable[[Mapping[str, Any]], dict[str, Any] | Refusal]] = {
    Shape.SHAREGPT: _sharegpt,
    Shape.ALPACA: _alpaca,
    Shape.PROMPTED: _prompted,
}


def _answer(text: str) -> list[Message]:
    return [{"role": ASSISTANT, "content": text}]


def _scored_answers(name: str, row: Mapping[str, Any]) -> list[tuple[str, float]] | Refusal:
    """Return (text, score) of each answer, from two lists or from one list of objects."""
    answers = row[name]
    scores: Any = next((row[key] for key in _SCORES if row.get(key) is not None), None)
    if scores is None:
        objects = [answer if isinstance(answer, Mapping) else {} for answer in answers]
        scores = [_first_value(answer, _ANSWER_SCORES, _minus_rank(answer)) for answer in objects]
        answers = [_first_value(answer, _ANSWER_TEXTS) for answer in objects]
    if not isinstance(scores, list) or len(scores) != len(answers):
        return Refusal(
            Reason.BAD_SCORE, f"expected a list of {len(answers)} scores, one for each of {name}"
        )
    found = []
    for index, (answer, score) in enumerate(zip(answers, scores, strict=True)):
        number = _number(score)
        if number is None:
            return Refusal(
                Reason.BAD_SCORE, f"the score of {name}[{index}] is {score!r}, not a finite number"
            )
        text = parse_content({name: answer}, name)
        if isinstance(text, Refusal):
            return text
        if not isinstance(text, str):
            return Refusal(Reason.WRONG_TYPE, f"{name}[{index}] is not text")
        found.append((text, number))
    return found


def _minus_rank(answer: Mapping[str, Any]) -> float | None:
    """Negate a rank, where 1 is the best, so that it orders like a score."""
    rank = _number(answer.get("rank"))
    return None if rank is None else -rank


def _first_value(values: Mapping[str, Any], names: Sequence[str], otherwise: Any = None) -> Any:
    return next((values[name] for name in names if values.get(name) is not None), otherwise)


def _number(value: Any) -> float | None:
    """Convert to a finite float, also from the text cells of CSV; None if it is not one."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _template_arguments(row: Mapping[str, Any]) -> dict[str, Any] | Refusal:
    """Collect the row's chat template arguments: `tools` and TRL's `chat_template_kwargs`."""
    arguments: dict[str, Any] = {}
    for name, kind in (("chat_template_kwargs", dict), ("tools", list)):
        value = row.get(name)
        if isinstance(value, str) and value:
            try:
                value = json.loads(value)
            except ValueError:
                return Refusal(Reason.WRONG_TYPE, f"{name} is text that is not valid JSON")
        if not value:
            continue
        if not isinstance(value, kind):
            return Refusal(
                Reason.WRONG_TYPE, f"{name} is a {type(value).__name__}, not a {kind.__name__}"
            )
        arguments |= value if kind is dict else {"tools": value}
    return arguments
