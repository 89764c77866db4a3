"""Every name of TRL's ORPOConfig, of release 1.16 and of earlier ones: the rows of `names.csv`.

A row has TRL's default, which is always accepted; what becomes of other values (`verdict`); the
setting that it becomes, as `section.leaf`, or what else does its work; and what is said.

- `same`: it is a setting by this name.
- `maps`: it is accepted, and becomes another setting.
- `no_effect`: it is accepted and decides nothing here; the remark says why.
- `refused`: the remark says what to set instead.
"""

import ast
import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Name:
    """A row of the table."""

    name: str
    default: Any
    verdict: str
    becomes: str
    remark: str


@cache
def names() -> dict[str, Name]:
    """The rows of the table by name."""
    with (Path(__file__).parent / "names.csv").open(encoding="utf-8", newline="") as file:
        rows = [Name(**{**row, "default": _value(row["default"])}) for row in csv.DictReader(file)]
    return {row.name: row for row in rows}


def _value(text: str) -> Any:
    """A default as Python has it; what is no literal is a text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
