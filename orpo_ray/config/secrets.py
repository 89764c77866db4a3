"""Detection of secrets in settings, by name or by value: no config takes one."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from orpo_ray.storage.hiding import hide, is_secret_name, without_secrets

_FIX = (
    "configs are written into the run directory and shown; set it in the environment (HF_TOKEN, "
    "AWS_SECRET_ACCESS_KEY, ...) of the nodes instead"
)
_URL_WITH_QUERY = re.compile(r"https?://\S+\?\S*=\S*")
_FROM_ENVIRONMENT = re.compile(r"oc\.env\s*:\s*([^,}\s]+)")


def take_out_secrets(values: dict[str, Any]) -> list[str]:
    """Remove secrets from nested settings; returns one finding each, without its value.

    Args:
        values: the settings, with `${oc.env:NAME}` resolved or not.
    """
    findings = []
    for path, problem in list(_secrets(values, ())):
        findings.append(f"{hide('.'.join(path))}: {problem}; {_FIX}")
        remove_setting(values, path)
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
            elif without_secrets(str(key)) != str(key):
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
        elif without_secrets(values) != values:
            yield path, "its value looks like a secret"
        elif _URL_WITH_QUERY.fullmatch(values):
            yield path, "its value is a URL with a query, which may be a signature"


def remove_setting(values: dict[str, Any], path: tuple[str, ...]) -> None:
    """Remove a setting; a list that contains a secret is removed whole."""
    target = values
    for key in path[:-1]:
        inner = target.get(key)
        if not isinstance(inner, dict):
            target.pop(key, None)
            return
        target = inner
    target.pop(path[-1], None)
