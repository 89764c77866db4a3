"""Rendering messages with a chat template, so that a pair is three texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from orpo_ray.preference.errors import DataError
from orpo_ray.preference.records import Content, Record


@dataclass(frozen=True)
class PairText:
    """A pair as text; prompt + chosen and prompt + rejected are what the model sees."""

    prompt: str
    chosen: str
    rejected: str


def render(record: Record, tokenizer: Any) -> PairText:
    """Text as it is; messages through the tokenizer's chat template.

    The prompt is rendered with the turn that asks for an answer. Where a template renders that
    turn otherwise once the answer is there, the prompt is what both renderings still share.

    Raises:
        DataError: for messages and a tokenizer without a template.
    """
    prompt, chosen, rejected = record.prompt, record.chosen, record.rejected
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        return PairText(prompt, chosen, rejected)
    if not tokenizer.chat_template:
        raise DataError(
            [
                "train_files: the pairs are messages, and the tokenizer has no chat template to "
                "render them with; use a chat model's tokenizer, or pairs of text"
            ]
        )
    asking = _rendered(tokenizer, prompt) if prompt else ""
    with_chosen = _rendered(tokenizer, (*prompt, *chosen), answered=True)
    with_rejected = _rendered(tokenizer, (*prompt, *rejected), answered=True)
    shared = shared_length(asking, with_chosen, with_rejected)
    return PairText(
        prompt=with_chosen[:shared],
        chosen=_ended(with_chosen[shared:], tokenizer.eos_token),
        rejected=_ended(with_rejected[shared:], tokenizer.eos_token),
    )


def shared_length(*sequences: Sequence[Any]) -> int:
    """How many leading items all sequences share."""
    columns = zip(*sequences, strict=False)
    return sum(1 for _ in takewhile(lambda items: len(set(items)) == 1, columns))


def _rendered(tokenizer: Any, messages: Content, answered: bool = False) -> str:
    """One conversation as text; a prompt asks for the next turn or leaves its own open."""
    open_turn = not answered and dict(messages[-1])["role"] == "assistant"  # type: ignore[arg-type]
    text: str = tokenizer.apply_chat_template(
        list(messages),
        tokenize=False,
        add_generation_prompt=not answered and not open_turn,
        continue_final_message=open_turn,
    )
    return text


def _ended(answer: str, eos: str) -> str:
    """Cut what a template writes after the end-of-sequence token: the answer ends there."""
    stripped = answer.rstrip()
    return stripped if stripped.endswith(eos) else answer
