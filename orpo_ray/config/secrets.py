"""Detection of secrets, by name or by value, which must not be in a config or a log."""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

HIDDEN = "[hidden]"
_FIX = (
    "configs are written into the run directory and shown; set it in the environment (HF_TOKEN, "
    "AWS_SECRET_ACCESS_KEY, ...) of the nodes instead"
)
# Whole names, with `_` between words; a plural like special_tokens is something else.
_NAME = re.compile(
    r"(^|_)(token|secrets?|passw(or)?d|passphrase|credentials?|bearer"
    r"|(api|access|private|secret|auth|account|signing)_?key(_id)?)(_value)?$"
    r"|password|secret_"
)
# Tokens of the vocabulary, which users of other trainers set.
_VOCABULARY = re.compile(r"(^|_)(eos|bos|pad|unk|sep|cls|mask|image|special|stop|end|start)_token$")
_VALUES = (
    re.compile(r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{30,}"),
    re.compile(r"(?<![A-Za-z0-9])sk-(?:[A-Za-z0-9]+-)*[A-Za-z0-9_]{20,}"),
    re.compile(r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])"),
    re.compile(r"(?<![A-Za-z0-9])(?:gh[a-z]|github_pat)_[A-Za-z0-9_]{30,}"),
    re.compile(r"(?<=://)[^\s/:@?#]*:[^\s/@]+(?=@)"),
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----[^\"']*"),
)
_FROM_ENVIRONMENT = re.compile(r"oc\.env\s*:\s*([^,}\s]+)")
_MIN_LENGTH = 10  # of a variable's value: shorter ones occur in ordinary text


def is_secret_name(name: str) -> bool:
    """Whether a key or a variable is named like a secret: `api_key`, `hfToken`, `DB_PASSWORD`."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)
    words = re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_")
    return bool(_NAME.search(words)) and not _VOCABULARY.search(words)


def hide(text: str) -> str:
    """Replace secrets in a text: known patterns, and values of secret environment variables."""
    for value in _secrets_of_environment():
        text = text.replace(value, HIDDEN)
    for pattern in _VALUES:
        text = pattern.sub(HIDDEN, text)
    return text


def take_out_secrets(values: dict[str, Any]) -> list[str]:
    """Remove secrets from nested settings; returns one finding each, without its value.

    Args:
        values: the settings, with `${oc.env:NAME}` resolved or not.
    """
    findings = []
    for path, problem in list(_secrets(values, ())):
        findings.append(f"{hide('.'.join(path))}: {problem}; {_FIX}")
        _remove(values, path)
    return findings


def find_secrets(values: Any) -> list[str]:
    """Findings as of `take_out_secrets`, without removing anything."""
    return [f"{hide('.'.join(path))}: {what}; {_FIX}" for path, what in _secrets(values, ())]


def _secrets(values: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Paths of all secrets, with the reason for each."""
    if isinstance(values, BaseModel):
        values = dict(values)
    if isinstance(values, Mapping):
        for key, value in values.items():
            place = (*path, str(key))
            if value is not None and is_secret_name(str(key)):
                yield place, "looks like a secret by its name"
            elif hide(str(key)) != str(key):
                yield place, "looks like a secret"
            else:
                yield from _secrets(value, place)
    elif isinstance(values, list | tuple):
        for index, value in enumerate(values):
            yield from _secrets(value, (*path, str(index)))
    elif isinstance(values, str):
        names = [name for name in _FROM_ENVIRONMENT.findall(values) if is_secret_name(name)]
        if names:
            yield path, f"reads the secret {names[0]}"
        elif hide(values) != values:
            yield path, "its value looks like a secret"


def _remove(values: dict[str, Any], path: tuple[str, ...]) -> None:
    """Remove a setting; a list that contains a secret is removed whole."""
    target = values
    for key in path[:-1]:
        inner = target.get(key)
        if not isinstance(inner, dict):
            target.pop(key, None)
            return
        target = inner
    target.pop(path[-1], None)


def _secrets_of_environment() -> list[str]:
    """Values of all environment variables named like secrets, the longest first.

    A path, as in GOOGLE_APPLICATION_CREDENTIALS, is not itself a secret.
    """
    values = {
        value
        for name, value in os.environ.items()
        if len(value) >= _MIN_LENGTH and is_secret_name(name) and not os.path.exists(value)
    }
    return sorted(values, key=len, reverse=True)
