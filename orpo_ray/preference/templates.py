"""Rendering pairs of messages as text with the chat template."""

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
    """A rendered pair; the model reads prompt + chosen and prompt + rejected."""

    prompt: str
    chosen: str
    rejected: str


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


def render(record: Record, tokenizer: Any) -> PairText | Refusal:
    """Render messages with the tokenizer's chat template; text is returned unchanged.

    The prompt includes the generation prompt. Where a template renders that differently once an
    answer follows, the prompt ends where the renderings begin to differ.

    Raises:
        DataError: for messages, if the tokenizer has no chat template.
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
        # Templates raise on purpose, for roles that the model does not support, and by accident.
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


def _apply_template(
    tokenizer: Any, messages: Content, arguments: Mapping[str, Any], answered: bool = False
) -> str:
    """Render one conversation; a prompt (not `answered`) ends where the answer is to begin.

    A prompt that ends with an assistant message is continued (prefill), any other is followed by
    the generation prompt.
    """
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
    """Remove white space that the template adds after the end-of-sequence token."""
    stripped = answer.rstrip()
    return stripped if stripped.endswith(eos) else answer


def empty_answer(text: PairText, eos: str) -> Refusal | None:
    """Refuse a pair if an answer has no text besides the end-of-sequence token."""
    for name, reason in (("chosen", Reason.EMPTY_CHOSEN), ("rejected", Reason.EMPTY_REJECTED)):
        answer: str = getattr(text, name)
        if not answer.strip().removesuffix(eos).strip():
            return Refusal(reason, f"{name} has no text before its end-of-sequence token")
    return None


def special_token_in(record: Record, tokenizer: Any) -> Refusal | None:
    """Refuse a pair if the text of its source row contains a special token of the tokenizer.

    A prompt may begin with the beginning-of-sequence token and an answer may end with the
    end-of-sequence token: tokenization puts each there exactly once anyway.
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
    """Yield every string in nested mappings and lists."""
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
    """Compile a pattern that matches any special token, the longest first."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    names = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")
