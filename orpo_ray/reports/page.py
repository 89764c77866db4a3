"""Rendering of the HTML pages and the model card: templates and SVG figures; on the driver."""

import html
import io
import re
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from orpo_ray.storage.hiding import hide, printable

# An underscore within a word is no markup.
_MARKDOWN = re.compile(r"[\\`*\[\]#|!~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")

# Inches between axes, and of these what is left of and below each: for ticks and their numbers.
_MARGIN_X, _LEFT = 0.75, 0.6
_MARGIN_Y, _BOTTOM = 0.8, 0.45


@cache
def _environment() -> Environment:
    """The templates of this package; values are escaped in HTML, and not in Markdown."""
    environment = Environment(
        loader=PackageLoader("orpo_ray.reports"),
        autoescape=select_autoescape(enabled_extensions=("html.j2",)),
        undefined=StrictUndefined,
        finalize=_shown,
        keep_trailing_newline=True,
    )
    environment.filters |= {"markdown": as_markdown, "fenced": fenced}
    return environment


def _shown(value: Any) -> Any:
    """A value without secrets and control characters; figures are markup, and stay as they are."""
    is_text = isinstance(value, str) and not isinstance(value, Markup)
    return printable(hide(value)) if is_text else value


def as_markdown(value: object) -> str:
    """A value as one line of Markdown that shows it as it is: no markup, no HTML, no cell's end."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return _MARKDOWN.sub(r"\\\g<0>", text)


def fenced(text: str, language: str = "") -> str:
    """A text as a block of code in Markdown, which no line of it ends."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def render(template: str, **values: Any) -> str:
    """The text of a template in `templates/`; an HTML page is one file and needs no network."""
    return _environment().get_template(template).render(**values)


def svg_of(figure: Any) -> str:
    """A matplotlib figure as an SVG element."""
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    whole = text.getvalue()
    return whole[whole.index("<svg") :]


def make_axes(
    n_columns: int, width: float = 9.0, height: float = 3.0, n_rows: int = 1
) -> tuple[Any, list[Any]]:
    """A figure with so many axes beside one another, row by row; sizes are in inches.

    Margins are fixed: what matplotlib finds out for them takes longer than drawing.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    grid = figure.subplots(n_rows, n_columns, squeeze=False)
    across, along = width / n_columns - _MARGIN_X, height / n_rows - _MARGIN_Y
    figure.subplots_adjust(
        left=_LEFT / width,
        right=1 - (_MARGIN_X - _LEFT) / width,
        bottom=_BOTTOM / height,
        top=1 - (_MARGIN_Y - _BOTTOM) / height,
        wspace=_MARGIN_X / across,
        hspace=_MARGIN_Y / along,
    )
    return figure, list(grid.flat)
