"""Rendering of the HTML pages and the model card: templates and SVG figures; on the driver."""

import io
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape


@cache
def _environment() -> Environment:
    """The templates of this package; values are escaped in HTML, and not in Markdown."""
    return Environment(
        loader=PackageLoader("orpo_ray.reports"),
        autoescape=select_autoescape(enabled_extensions=("html.j2",)),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )


def render(template: str, **values: Any) -> str:
    """The text of a template in `templates/`; an HTML page is one file and needs no network."""
    return _environment().get_template(template).render(**values)


def svg_of(figure: Any) -> str:
    """A matplotlib figure as an SVG element."""
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    whole = text.getvalue()
    return whole[whole.index("<svg") :]


def make_axes(n_columns: int, width: float = 9.0, height: float = 3.0) -> tuple[Any, list[Any]]:
    """A figure with so many axes beside one another; sizes are in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(1, n_columns, squeeze=False)
    return figure, list(grid[0])
