r"""References in config files: to other settings, and to variables of the environment by a list.

`${train.seed}` is the value of another setting, `${oc.env:NAME}` or `${oc.env:NAME,default}` that
of an environment variable, and `\${` the two characters themselves. A config may come from
someone else, and what it holds is written down and shown. So it reads only the variables that
ORPO_RAY_CONFIG_ENV names, and nothing else that OmegaConf could compute.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from orpo_ray.config.secrets import remove_setting

ALLOWED = "ORPO_RAY_CONFIG_ENV"
# Backslashes before it are escaped in pairs; an odd one escapes it.
_BEGIN = re.compile(r"(\\*)\$\{")
_REFERENCE = re.compile(r"(?<!\\)(?:\\\\)*\$\{([^${}]*)(\}?)")
_SETTING = re.compile(r"\s*[A-Za-z_][\w.]*\s*")
_VARIABLE = re.compile(r"\s*oc\.env\s*:\s*(\w+)\s*(,[^\\]*)?")


def escape_references(values: Any) -> Any:
    """The values with every `${` in a text escaped, so that it is read back as text."""
    if isinstance(values, Mapping):
        return {key: escape_references(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [escape_references(value) for value in values]
    if isinstance(values, str):
        return _BEGIN.sub(lambda found: f"{found[1] * 2}\\${{", values)
    return values


def take_out_references(values: dict[str, Any]) -> list[str]:
    """Remove settings with a reference that is not allowed; returns one finding each."""
    findings = []
    for path, problem in list(_problems(values, ())):
        findings.append(f"{'.'.join(map(str, path))}: {problem}")
        remove_setting(values, tuple(map(str, path)))
    return findings


def _problems(values: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], str]]:
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _problems(value, (*path, key))
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from _problems(value, (*path, index))
    elif isinstance(values, str):
        found = [what for match in _REFERENCE.finditer(values) if (what := _problem(match))]
        if found:
            yield path, found[0]


def _problem(match: re.Match[str]) -> str | None:
    """What is wrong with a reference, if anything is."""
    inner, end = match[1], match[2]
    if end and _SETTING.fullmatch(inner):
        return None
    variable = _VARIABLE.fullmatch(inner) if end else None
    if variable is None:
        return (
            "`${` begins a reference to another setting, or to a variable as ${oc.env:NAME}, and "
            "this is neither; write `\\${` for a text that has it"
        )
    if variable[1] not in re.split(r"[\s,]+", os.environ.get(ALLOWED, "")):
        return (
            f"reads the environment variable {variable[1]}, which configs may not; to allow it, "
            f"set {ALLOWED}={variable[1]} in the environment, or write `\\${{` for the text itself"
        )
    return None
