"""Reading a row as pairs, whatever its layout of columns."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from orpo_ray.preference.layouts import (
    ANSWERS,
    CONVERSATIONS,
    INPUTS,
    OPENAI,
    PROMPT_COLUMNS,
    QUESTIONS,
    REJECTED,
    SCORES,
    SIDES,
    SYSTEMS,
    TEMPLATE,
    Shape,
    with_one_answer,
)
from orpo_ray.preference.messages import (
    decode_messages,
    missing_field,
    parse_content,
    role_of,
    without_nulls,
)
from orpo_ray.preference.pairing import make_pair
from orpo_ray.preference.prompts import find_fields, prompt_beside, system_text, with_system
from orpo_ray.preference.records import (
    ASSISTANT,
    Content,
    Note,
    Reason,
    Record,
    Refusal,
)
from orpo_ray.preference.scores import (
    COMPARISONS,
    Comparison,
    is_absent,
    is_null,
    number,
    preferred,
    score_columns,
    scored_answers,
)

_BLANKS = " \t\ufeff"  # around the names of a table's header


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
class _Found:
    """Pairs of a row, their shape, and the columns that they come from."""

    shape: Shape
    used: frozenset[str]
    records: tuple[Record, ...]
    left_out: int = 0


@dataclass(frozen=True)
class RowReader:
    """Reads rows as pairs, detecting the shape of each row from its columns.

    Args:
        column_mapping: (expected name, column in the data) where the two differ.
        min_score_gap: minimum chosen score minus rejected score, for pairs that have scores.
        takes_one_answer: whether a row may have no rejected answer, as for supervised fine-tuning;
            its record then has the chosen one on both sides.
    """

    column_mapping: tuple[tuple[str, str], ...] = ()
    min_score_gap: float | None = None
    takes_one_answer: bool = False

    def read(self, row: Mapping[str, Any]) -> ParsedRow | Refusal:
        """Read the pairs of one row, or refuse it."""
        named = self._named(row)
        if isinstance(named, Refusal):
            return named
        for column in SIDES:  # joined data sets have columns of null
            if named.get(column) is None and any(
                n in named for n in (*ANSWERS, *REJECTED, *OPENAI)
            ):
                named.pop(column, None)
        alone = with_one_answer(named) if self.takes_one_answer else None
        is_openai = OPENAI[0] in named and "chosen" not in named and alone is None
        if is_openai:
            named = _openai(named)
        named = alone or named
        found = decode_messages(named, SIDES) or self._found(named, is_alone=alone is not None)
        if isinstance(found, Refusal):
            return found if self.takes_one_answer else _with_hint(found, named)
        used, records = found.used, found.records
        template = _template_arguments(named)
        if isinstance(template, Refusal):
            return template
        if not isinstance(records[0].chosen, str):  # texts take no template
            used |= set(TEMPLATE)
            if template:
                records = tuple(replace(record, template=template) for record in records)
        ignored = frozenset(map(str, named.keys() - used))
        unused = [n for n, _ in self.column_mapping if n in ignored & PROMPT_COLUMNS]
        if unused:
            text = f"column_mapping: {unused[0]} is not read, as the row has the prompt elsewhere"
            return Refusal(Reason.WRONG_TYPE, text)
        shape = Shape.OPENAI if is_openai else found.shape
        return ParsedRow(shape, records, ignored, found.left_out)

    def _named(self, row: Mapping[str, Any]) -> dict[str, Any] | Refusal:
        """The row's columns by the names that shapes have; columns of null are left out."""
        if any(name != name.strip(_BLANKS) for name in map(str, row)):
            row = {str(name).strip(_BLANKS): value for name, value in row.items()}
        if self.column_mapping:
            taken = {column for _, column in self.column_mapping}
            for name, column in self.column_mapping:
                if column not in row:
                    return missing_field(row, column, field=name)
            others = {name: value for name, value in row.items() if name not in taken}
            row = others | {name: row[column] for name, column in self.column_mapping}
        return {
            name: None if is_null(value) else value
            for name, value in row.items()
            if name in ("prompt", *SIDES) or not is_null(value)
        }

    def _found(self, row: Mapping[str, Any], is_alone: bool) -> _Found | Refusal:
        if "chosen" not in row:
            form = next((form for form in COMPARISONS if form.fits(row)), None)
            if form is not None:
                return _comparison(row, form)
            if any(isinstance(row.get(name), list) for name in ANSWERS):
                return self._ranking(row)
            name = next((name for name in REJECTED if name in row and "messages" in row), None)
            if name is not None:
                found = _with_rejected(row, name)
                notes = self._compared_scores(row)
                return found if isinstance(found, Refusal) else _with_notes(found, notes)
        return self._pair(row, is_alone)

    def _pair(self, row: Mapping[str, Any], is_alone: bool) -> _Found | Refusal:
        notes = self._compared_scores(row)
        if isinstance(notes, Refusal):
            return notes
        fields = find_fields(row)
        if isinstance(fields, Refusal):
            return fields
        record = make_pair(fields.prompt, fields.chosen, fields.rejected, is_alone)
        if isinstance(record, Refusal):
            return _missing_prompt(row, record)
        if notes:
            record = replace(record, notes=record.notes | notes)
        scores = {name for pair in score_columns(tuple(map(str, row))) for name in pair}
        shape = Shape.ALONE if is_alone else fields.shape
        return _Found(shape, fields.used | scores, (record,))

    def _compared_scores(self, row: Mapping[str, Any]) -> frozenset[Note] | Refusal:
        """What two scores beside a pair say of it."""
        pairs = score_columns(tuple(map(str, row)))
        names = next((n for n in pairs if not any(is_absent(row[c]) for c in n)), None)
        if names is None:
            return frozenset()
        scores = [number(row[name]) for name in names]
        chosen, rejected = scores
        if chosen is None or rejected is None:
            shown = [row[name] for name in names]
            return Refusal(Reason.BAD_SCORE, f"scores {shown} are not two numbers")
        gap = chosen - rejected
        if self.min_score_gap is not None and gap < self.min_score_gap:
            return Refusal(
                Reason.SCORE_GAP, f"{names[0]} - {names[1]} is {gap:g}, less than min_score_gap"
            )
        note = Note.SCORES_REVERSED if gap < 0 else Note.SCORES_EQUAL
        return frozenset({note} if gap <= 0 else ())

    def _ranking(self, row: Mapping[str, Any]) -> _Found | Refusal:
        """Pair every two answers whose scores differ enough; the higher score is chosen."""
        name = next(name for name in ANSWERS if isinstance(row.get(name), list))
        scored = scored_answers(name, row, SCORES)
        if isinstance(scored, Refusal):
            return scored
        found = _ranked_prompt(row)
        if isinstance(found, Refusal):
            return found
        asked, used = found
        used |= {name, *SCORES}
        records, left_out, too_near = [], 0, False
        problem: Refusal | None = None
        for better, worse, gap in scored.pairs():
            if gap == 0 or gap < (self.min_score_gap or 0.0):
                left_out += 1
                too_near |= gap != 0
                continue
            record = make_pair(asked, better, worse)
            if isinstance(record, Refusal):
                left_out += 1
                problem = problem or record
            else:
                records.append(record)
        if not records:
            reason = Reason.SCORE_GAP if too_near else Reason.BAD_SCORE
            text = f"no two of {len(scored.answers)} {name} differ enough in their scores"
            return problem or Refusal(reason, text)
        return _Found(Shape.RANKING, frozenset(used), tuple(records), left_out)


def _with_hint(refusal: Refusal, row: Mapping[str, Any]) -> Refusal:
    """The refusal, and which objective would take the row if it has one answer."""
    if refusal.reason not in (Reason.MISSING_FIELD, Reason.NULL_FIELD):
        return refusal
    if with_one_answer(row) is None:
        return refusal
    return replace(refusal, detail=f"{refusal.detail}; objective=sft takes rows of one answer")


def _with_notes(found: _Found, notes: frozenset[Note] | Refusal) -> _Found | Refusal:
    """The one pair of a row with what its scores say of it, or the refusal for them."""
    if isinstance(notes, Refusal):
        return notes
    (record,) = found.records
    return replace(found, records=(replace(record, notes=record.notes | notes),))


def _openai(row: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's preference lines as prompt, chosen, rejected and tools."""
    inner = row.get("input")
    with contextlib.suppress(ValueError, RecursionError):
        inner = json.loads(inner) if isinstance(inner, str) else inner
    if isinstance(inner, list):
        inner = {"messages": inner}
    inner = inner if isinstance(inner, Mapping) else {}
    found = {name: value for name, value in row.items() if name not in ("input", *OPENAI)}
    found |= {"chosen": row[OPENAI[0]], "rejected": row.get(OPENAI[1])}
    if inner.get("messages") is not None:
        found["prompt"] = inner["messages"]
    if inner.get("tools") is not None:
        found["tools"] = inner["tools"]
    return found


def _ranked_prompt(row: Mapping[str, Any]) -> tuple[Content, set[str]] | Refusal:
    """The prompt of a ranking, and the columns that it comes from.

    A question alone stays a text; with an input, a system message or others it is messages.
    """
    texts = [n for n in ("prompt", *QUESTIONS) if not is_absent(row.get(n)) and row[n] != []]
    others = [n for n in (*CONVERSATIONS, *INPUTS) if not is_absent(row.get(n))]
    asked: Content | Refusal | None
    if "prompt" in texts or (texts and not others):
        name = texts[0]
        asked, used = parse_content(row, name), {name}
    else:
        beside = prompt_beside(row)
        if isinstance(beside, Refusal):
            return beside
        if beside is None and not isinstance(row.get("prompt"), str):
            return missing_field(row, "prompt", (*ANSWERS, *SCORES))
        _, used, asked = beside or (Shape.RANKING, {"prompt"}, "")
    if isinstance(asked, Refusal):
        return asked
    if system_text(row):
        asked, used = with_system(row, asked) or asked, used | set(SYSTEMS)
    return asked, used


def _with_rejected(row: Mapping[str, Any], name: str) -> _Found | Refusal:
    """`messages` that end with the chosen answer, and the rejected one (ms-swift)."""
    whole, rejected = parse_content(row, "messages"), parse_content(row, name)
    if isinstance(whole, Refusal):
        return whole
    if isinstance(rejected, Refusal):
        return rejected
    if isinstance(whole, str) or not whole or role_of(whole[-1]) != ASSISTANT:
        text = f"messages does not end with an answer of the assistant, to which {name} is another"
        return Refusal(Reason.NOT_AN_ANSWER, text)
    prompt: Content | None = whole[:-1]
    if system_text(row):
        prompt = with_system(row, prompt)
    record = make_pair(prompt, whole[-1:], rejected)
    if isinstance(record, Refusal):
        return record
    return _Found(Shape.REJECTED, frozenset({"messages", name, *SYSTEMS}), (record,))


def _comparison(row: Mapping[str, Any], form: Comparison) -> _Found | Refusal:
    """Two answers in columns of their own, and a column that says which one is preferred."""
    better = preferred(row, form)
    if isinstance(better, Refusal):
        return better
    chosen, rejected = better
    pair = {n: v for n, v in row.items() if n not in form.answers}
    pair |= {"chosen": row[chosen], "rejected": row[rejected]}
    fields = find_fields(pair)
    if isinstance(fields, Refusal):
        return fields
    record = make_pair(fields.prompt, fields.chosen, fields.rejected)
    if isinstance(record, Refusal):
        return record
    return _Found(Shape.COMPARISON, fields.used | {*form.answers, form.column}, (record,))


def _missing_prompt(row: Mapping[str, Any], refusal: Refusal) -> Refusal:
    """The refusal of a row without a prompt, naming its columns."""
    if refusal.reason is not Reason.MISSING_FIELD:
        return refusal
    found = missing_field(row, "prompt", SIDES)
    if found.reason is Reason.NULL_FIELD:
        return found
    return Refusal(found.reason, f"{refusal.detail}; {found.detail}")


def _template_arguments(row: Mapping[str, Any]) -> dict[str, Any] | Refusal:
    """Collect the row's chat template arguments: `tools` and TRL's `chat_template_kwargs`."""
    arguments: dict[str, Any] = {}
    for name, kind in (("chat_template_kwargs", dict), ("tools", list)):
        value = row.get(name)
        if isinstance(value, str) and value:
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                return Refusal(Reason.WRONG_TYPE, f"{name} is text that is not valid JSON")
        if not value:
            continue
        if not isinstance(value, kind):
            return Refusal(
                Reason.WRONG_TYPE, f"{name} is a {type(value).__name__}, not a {kind.__name__}"
            )
        if kind is list:
            value = [_tool(tool) for tool in value]
        arguments |= value if kind is dict else {"tools": value}
    return arguments


def _tool(tool: Any) -> Any:
    """A tool as an object; Arrow cannot store schemas of several forms but as JSON text."""
    if isinstance(tool, str):
        try:
            tool = json.loads(tool)
        except (ValueError, RecursionError):
            return tool
    tool = without_nulls(tool)  # Arrow adds them to schemas, also in lines that it wrote
    function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
    if isinstance(function, Mapping) and isinstance(function.get("parameters"), str):
        decoded = {**function, "parameters": _tool(function["parameters"])}
        return {**tool, "function": decoded} if "function" in tool else decoded
    return tool
