"""Finding special tokens in the text of a row, where only the chat template may write them."""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from orpo_ray.preference.records import Reason, Record, Refusal

_HINT = "to encode it as one, set special_tokens_in_text=allow"


def special_token_in(record: Record, tokenizer: Any) -> Refusal | None:
    """Refuse a pair if a text of its source row contains a special token of the tokenizer.

    Messages, tools, template arguments and their keys are searched. A text prompt may begin with
    the beginning-of-sequence token, and an answer may end with the end-of-sequence token:
    tokenization puts each there exactly once anyway.
    """
    pattern = special_tokens(tokenizer)
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token
    for name in ("prompt", "chosen", "rejected"):
        content = getattr(record, name)
        if isinstance(content, str):
            own = content.removeprefix(bos) if name == "prompt" else without_end(content, eos)
            texts = [own]
        else:
            texts = _strings(content if name == "prompt" else without_last_end(content, eos))
        found = next(filter(None, map(pattern.search, texts)), None)
        if found:
            return _refusal(name, found.group())
    for name, value in record.template.items():
        found = next(filter(None, map(pattern.search, (name, *_strings(value)))), None)
        if found:
            return _refusal("tools" if name == "tools" else "chat_template_kwargs", found.group())
    return None


def refuse_ids(name: str, token: str) -> Refusal:
    """The refusal of a text whose token ids contain a special token that its characters hide."""
    return _refusal(name, token)


def _refusal(name: str, token: str) -> Refusal:
    return Refusal(Reason.SPECIAL_TOKEN, f"{name} contains the special token {token}; {_HINT}")


def without_end(answer: str, eos: str) -> str:
    """An answer without the end-of-sequence token that it ends with, if it does."""
    stripped = answer.rstrip()
    return stripped.removesuffix(eos) if stripped.endswith(eos) else answer


def without_last_end(messages: Sequence[Any], eos: str) -> tuple[Any, ...]:
    """Messages whose last one does not end with the end-of-sequence token."""
    if not messages or not messages[-1]["content"].rstrip().endswith(eos):
        return tuple(messages)
    last = messages[-1]
    return (*messages[:-1], {**last, "content": without_end(last["content"], eos)})


def _strings(value: Any) -> list[str]:
    """Every string in nested mappings and lists, keys included; of plain messages their text."""
    if isinstance(value, str):
        return [value]
    found: list[str] = []
    if isinstance(value, Mapping):
        if len(value) == 2 and "role" in value and isinstance(value.get("content"), str):
            return [value["content"]]
        for key, part in value.items():
            found.append(str(key))
            found += _strings(part)
    elif isinstance(value, list | tuple):
        for part in value:
            found += _strings(part)
    return found


def has_open_edge(record: Record, tokenizer: Any) -> bool:
    """Whether a text of the row may be completed to a special token by the text beside it.

    True if one ends with the beginning of a special token, or begins with the end of one.
    """
    heads, tails, last_letters, first_letters = _edges(tokenizer)
    parts = (record.prompt, record.chosen, record.rejected, record.template)
    return any(
        (text[-1:] in last_letters and text.endswith(heads))
        or (text[:1] in first_letters and text.startswith(tails))
        for part in parts
        for text in _strings(part)
    )


def closed_edges(value: Any) -> Any:
    """A copy in which a letter stands before and after every text, keys and roles aside."""
    if isinstance(value, str):
        return f"x{value}x"
    if isinstance(value, Mapping):
        return {
            key: part if key in ("role", "type") else closed_edges(part)
            for key, part in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(closed_edges(part) for part in value)
    return value


@lru_cache(maxsize=8)
def special_names(tokenizer: Any) -> tuple[str, ...]:
    """All special tokens, the longest first."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True))


@lru_cache(maxsize=8)
def special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """A pattern that matches any special token."""
    return re.compile("|".join(map(re.escape, special_names(tokenizer))) or r"(?!)")


@lru_cache(maxsize=8)
def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of all special tokens."""
    return frozenset(tokenizer.convert_tokens_to_ids(list(special_names(tokenizer))))


@lru_cache(maxsize=8)
def _edges(
    tokenizer: Any,
) -> tuple[tuple[str, ...], tuple[str, ...], frozenset[str], frozenset[str]]:
    """Proper beginnings and ends of all special tokens, and their last and first letters."""
    names = [name for name in special_names(tokenizer) if len(name) > 1]
    heads = {name[:n] for name in names for n in range(1, len(name))}
    tails = {name[n:] for name in names for n in range(1, len(name))}
    last, first = {head[-1] for head in heads}, {tail[0] for tail in tails}
    return tuple(heads), tuple(tails), frozenset(last), frozenset(first)
