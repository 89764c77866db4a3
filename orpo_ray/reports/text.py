"""Texts of data, files and settings for a terminal, where they are shown and never interpreted."""

from rich.text import Text

from orpo_ray.storage.hiding import hide, printable


def as_text(value: object) -> Text:
    """A cell or a line as it is: no markup, no control characters, no secrets."""
    return Text(printable(hide(str(value))))
