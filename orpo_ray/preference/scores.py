"""Scores and ranks of answers, and labels that say which of two answers is preferred."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any, Literal

from orpo_ray.preference.messages import parse_content
from orpo_ray.preference.records import Content, Reason, Refusal

# The score of the chosen answer, which has a column of the same name for the rejected one.
_SCORE_COLUMN = re.compile(r"(?=.*(?:score|rating|reward))(?:.*[_-])?chosen(?:[_-].*)?")
SCORE_COLUMNS = (("score_chosen", "score_rejected"),)
_ANSWER_TEXTS = ("text", "content", "response", "answer", "completion")
_ANSWER_SCORES = ("score", "rating", "overall_score")
_RANKS = ("ranks", "ranking")


@dataclass(frozen=True)
class Comparison:
    """A layout of two answers in columns of their own and a column with the preferred one.

    Args:
        answers: the two columns.
        column: says which is preferred.
        kind: `index` of the preferred answer; `is_first`, 1 if that is the first; `strength`,
            negative if that is the first, and 0 for none; `name`, which ends in the name of one.
    """

    answers: tuple[str, str]
    column: str
    kind: Literal["index", "is_first", "strength", "name"]

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has all three columns."""
        return self.column in row and all(name in row for name in self.answers)


COMPARISONS = (
    Comparison(("response_0", "response_1"), "better_response_id", "index"),  # PKU-SafeRLHF
    Comparison(("human_ref_A", "human_ref_B"), "labels", "is_first"),  # SHP
    Comparison(("response_1", "response_2"), "preference_strength", "strength"),  # HelpSteer2
    Comparison(("response1", "response2"), "overall_preference", "strength"),  # HelpSteer3
    Comparison(("response_a", "response_b"), "winner", "name"),  # Chatbot Arena
    Comparison(("conversation_a", "conversation_b"), "winner", "name"),
)


@lru_cache(maxsize=64)
def score_columns(columns: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Columns with the scores of a pair, as (chosen, rejected), among those of a row."""
    pairs = ((name, name.replace("chosen", "rejected")) for name in columns)
    return tuple(pair for pair in pairs if pair[1] in columns and _SCORE_COLUMN.fullmatch(pair[0]))


def preferred(row: Mapping[str, Any], form: Comparison) -> tuple[str, str] | Refusal:
    """The columns of the preferred and of the other answer."""
    first, second = form.answers
    value = row[form.column]
    if form.kind == "name":
        name = str(value).strip().lower()
        if name.endswith(("tie", "tie (bothbad)", "bothbad")):
            return _no_preference(form, value)
        ends = [name.endswith((column[-2:], f" {column[-1]}")) for column in form.answers]
        found = [name == column[-1] or end for column, end in zip(form.answers, ends, strict=True)]
        if found[0] == found[1]:
            return _no_preference(form, value)
        return (first, second) if found[0] else (second, first)
    label = number(int(value) if isinstance(value, bool) else value)
    if form.kind == "strength":
        if label is None or label == 0:
            return _no_preference(form, value)
        return (first, second) if label < 0 else (second, first)
    if label not in (0.0, 1.0):
        return _no_preference(form, value)
    is_first = label == (1.0 if form.kind == "is_first" else 0.0)
    return (first, second) if is_first else (second, first)


def _no_preference(form: Comparison, value: Any) -> Refusal:
    return Refusal(
        Reason.BAD_SCORE,
        f"{form.column} is {value!r}, which prefers neither {form.answers[0]} nor "
        f"{form.answers[1]}",
    )


@dataclass(frozen=True)
class ScoredAnswers:
    """Answers to one prompt and their scores."""

    answers: tuple[Content, ...]
    scores: tuple[float, ...]

    def pairs(self) -> Iterator[tuple[Content, Content, float]]:
        """Yield (better, worse, difference of their scores) of every two answers."""
        for one, other in combinations(range(len(self.answers)), 2):
            gap = self.scores[one] - self.scores[other]
            better, worse = (one, other) if gap > 0 else (other, one)
            yield self.answers[better], self.answers[worse], abs(gap)


def scored_answers(
    name: str, row: Mapping[str, Any], score_names: Sequence[str]
) -> ScoredAnswers | Refusal:
    """Read answers and their scores, from two lists or from one list of objects."""
    answers = row[name]
    column = next((key for key in score_names if row.get(key) is not None), None)
    if column is None:
        objects = [answer if isinstance(answer, Mapping) else {} for answer in answers]
        scores = [_first_value(answer, _ANSWER_SCORES, _minus_rank(answer)) for answer in objects]
        if all(score is None for score in scores):
            columns = ", ".join(sorted(map(str, row)))
            return Refusal(
                Reason.BAD_SCORE,
                f"{name} have no scores, and no column has them ({', '.join(score_names)}); the "
                f"row has {columns}",
            )
        answers = [_first_value(answer, _ANSWER_TEXTS) for answer in objects]
    else:
        scores = row[column]
    if not isinstance(scores, list) or len(scores) != len(answers):
        return Refusal(
            Reason.BAD_SCORE, f"expected a list of {len(answers)} scores, one for each of {name}"
        )
    texts, numbers = [], []
    for index, (answer, score) in enumerate(zip(answers, scores, strict=True)):
        value = number(score)
        if value is None:
            return Refusal(
                Reason.BAD_SCORE, f"the score of {name}[{index}] is {score!r}, not a finite number"
            )
        text = parse_content({name: answer}, name)
        if isinstance(text, Refusal):
            return text
        texts.append(text)
        numbers.append(-value if column in _RANKS else value)
    return ScoredAnswers(tuple(texts), tuple(numbers))


def _minus_rank(answer: Mapping[str, Any]) -> float | None:
    """Negate a rank, where 1 is the best, so that it orders like a score."""
    rank = number(answer.get("rank"))
    return None if rank is None else -rank


def _first_value(values: Mapping[str, Any], names: Sequence[str], otherwise: Any = None) -> Any:
    return next((values[name] for name in names if values.get(name) is not None), otherwise)


def is_null(value: Any) -> bool:
    """Whether a value is null, or NaN, which pandas has for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_absent(value: Any) -> bool:
    """Whether a cell is empty: null, or text without a letter."""
    return is_null(value) or (isinstance(value, str) and not value.strip())


def number(value: Any) -> float | None:
    """Convert to a finite float, also from the text cells of CSV; None if it is not one."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None
