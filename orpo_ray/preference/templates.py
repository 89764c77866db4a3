"""Rendering messages with a chat template, so that a pair is three texts."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from orpo_ray.preference.errors import DataError
from orpo_ray.preference.records import ASSISTANT, Content, Reason, Record, Refusal, role_of


@dataclass(frozen=True)
class PairText:
    """A pair as text; prompt + chosen and prompt + rejected are what the model sees."""

    prompt: str
    chosen: str
    rejected: str


def template_text(setting: str) -> str:
    """The chat template that a setting names or holds.

    Raises:
        DataError: for a file that is not there.
    """
    if "{" in setting:
        return setting
    path = Path(setting).expanduser()
    if not path.is_file():
        raise DataError([f"chat_template: {setting}: no such file, and not a Jinja template"])
    return path.read_text(encoding="utf-8")


def render(record: Record, tokenizer: Any) -> PairText | Refusal:
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
                "render them with; give one as chat_template, use a chat model's tokenizer, or "
                "pairs of text"
            ]
        )
    try:
        return _render_messages(record, tokenizer)
    except Exception as error:
        # A template is a program: it raises on turns that its model does not take, and on others.
        return Refusal(Reason.TEMPLATE_REFUSED, f"the chat template raised: {error}")


def _render_messages(record: Record, tokenizer: Any) -> PairText | Refusal:
    prompt, chosen, rejected = record.prompt, record.chosen, record.rejected
    arguments = record.template
    asking = _apply_template(tokenizer, prompt, arguments) if prompt else ""
    with_chosen = _apply_template(tokenizer, (*prompt, *chosen), arguments, answered=True)
    with_rejected = _apply_template(tokenizer, (*prompt, *rejected), arguments, answered=True)
    shared = shared_length(asking, with_chosen, with_rejected)
    asked = _apply_template(tokenizer, prompt, arguments, answered=True) if prompt else ""
    if shared < shared_length(asking, asked):
        lost = asking[shared : shared + 40]
        return Refusal(
            Reason.UNSTABLE_BORDER,
            f"the chat template renders the prompt differently before an answer, from {lost!r} on",
        )
    return PairText(
        prompt=with_chosen[:shared],
        chosen=_cut_after_eos(with_chosen[shared:], tokenizer.eos_token),
        rejected=_cut_after_eos(with_rejected[shared:], tokenizer.eos_token),
    )


def shared_length(*sequences: Sequence[Any]) -> int:
    """How many leading items all sequences share; whole slices are compared, halving."""
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


def _apply_template(
    tokenizer: Any, messages: Content, arguments: Mapping[str, Any], answered: bool = False
) -> str:
    """One conversation as text; a prompt asks for the next turn or leaves its own open."""
    open_turn = not answered and role_of(messages[-1]) == ASSISTANT  # type: ignore[arg-type]
    text: str = tokenizer.apply_chat_template(
        list(messages),
        tokenize=False,
        add_generation_prompt=not answered and not open_turn,
        continue_final_message=open_turn,
        **arguments,
    )
    return text


def _cut_after_eos(answer: str, eos: str) -> str:
    """Cut what a template writes after the end-of-sequence token: the answer ends there."""
    stripped = answer.rstrip()
    return stripped if stripped.endswith(eos) else answer


def empty_answer(text: PairText, eos: str) -> Refusal | None:
    """Why a pair has an answer without text: nothing is left of it but its end."""
    for name, reason in (("chosen", Reason.EMPTY_CHOSEN), ("rejected", Reason.EMPTY_REJECTED)):
        answer: str = getattr(text, name)
        if not answer.strip().removesuffix(eos).strip():
            return Refusal(reason, f"{name} has no text before its end-of-sequence token")
    return None


def special_token_in(record: Record, tokenizer: Any) -> Refusal | None:
    """The first special token of the tokenizer that a pair's own text holds, if one does.

    A prompt of text may begin with the beginning-of-sequence token, and an answer may end with the
    end-of-sequence token: both are put there once in any case.
    """
    pattern = _special_tokens(tokenizer)
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token
    for name in ("prompt", "chosen", "rejected"):
        content = getattr(record, name)
        turns = [{"content": content}] if isinstance(content, str) else content
        for turn in turns:
            text = turn["content"]
            own = text.removeprefix(bos) if name == "prompt" else text.removesuffix(eos)
            rest = [value for key, value in turn.items() if key != "content"]
            found = next(filter(None, map(pattern.search, [own, *_strings(rest)])), None)
            if found:
                return Refusal(
                    Reason.SPECIAL_TOKEN,
                    f"{name} contains the special token {found.group()}; to encode it as one, set "
                    "special_tokens_in_text=allow",
                )
    return None


def _strings(value: Any) -> Iterator[str]:
    """All text in messages, wherever in them it stands."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _strings(part)


@lru_cache(maxsize=8)
def _special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Any of the tokens that a tokenizer reads as more than their letters."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    names = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")
