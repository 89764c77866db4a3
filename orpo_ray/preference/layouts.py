"""The names of columns that rows are read from, and the layouts (shapes) that they make up."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from orpo_ray.preference.scores import COMPARISONS, SCORE_COLUMNS

ANSWERS = ("completions", "responses", "answers")
SCORES = ("scores", "ratings", "ranks", "ranking")
# Columns of a prompt: of messages, of the user's question, and of what belongs to the question.
CONVERSATIONS = ("messages", "conversations", "conversation", "context", "history", "dialogue")
QUESTIONS = ("instruction", "question", "query", "problem")
INPUTS = ("input", "context")
SYSTEMS = ("system", "system_prompt", "system_message")
TEMPLATE = ("tools", "chat_template_kwargs")
SIDES = ("chosen", "rejected")
OPENAI = ("preferred_output", "non_preferred_output")
REJECTED = ("rejected_response", "rejected_messages")
# Columns of the one answer of a row for supervised fine-tuning, or of the whole conversation.
ALONE = ("chosen", "completion", "output", "response", "answer", "messages", "conversations")


class Shape(StrEnum):
    """Layout of a row's columns; the values are the names in reports."""

    TEXT = "texts (prompt, chosen, rejected)"
    DIALOGUES = "dialogues in text (chosen, rejected)"
    MESSAGES = "messages (prompt, chosen, rejected)"
    CONVERSATIONS = "messages (chosen, rejected)"
    PROMPTED = "messages (chosen, rejected) with the prompt beside them"
    SHAREGPT = "ShareGPT turns (conversations, chosen, rejected)"
    BESIDE = "answers (chosen, rejected) beside messages"
    ALPACA = "Alpaca (instruction, input, chosen, rejected)"
    QUESTION = "chat texts (question, system, chosen, rejected)"
    OPENAI = "OpenAI preferences (input, preferred_output, non_preferred_output)"
    REJECTED = "conversations with a second answer (messages, rejected_response)"
    COMPARISON = "two answers and which one is preferred"
    RANKING = "rankings (one prompt, scored answers)"
    ALONE = "one answer (no rejected)"


PROMPT_COLUMNS = frozenset({"prompt", *CONVERSATIONS, *QUESTIONS, *INPUTS})
"""Columns that may hold the prompt or a part of it."""

COLUMN_NAMES = frozenset(
    {
        *(*PROMPT_COLUMNS, *SIDES, *ANSWERS, *SCORES, *SYSTEMS),
        *(*TEMPLATE, *OPENAI, *REJECTED, *(n for names in SCORE_COLUMNS for n in names)),
        *(name for form in COMPARISONS for name in (*form.answers, form.column)),
    }
)
"""Every column that some shape reads, and which `column_mapping` may name."""


def with_one_answer(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """A row that has one answer with this as both of its sides; None for one that has two.

    Args:
        row: by the names above, without columns of null but for `prompt`, `chosen` and `rejected`.
    """
    others = (*ANSWERS, *REJECTED, *OPENAI)
    if row.get("rejected") is not None or any(name in row for name in others):
        return None
    if any(form.fits(row) for form in COMPARISONS):
        return None
    name = next((name for name in ALONE if row.get(name) is not None), None)
    if name is None:
        return None
    rest = {n: value for n, value in row.items() if n != name}
    return rest | dict.fromkeys(SIDES, row[name])
