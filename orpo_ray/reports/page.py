"""What the project's HTML reports share: one file, no network, light and dark; on the driver."""

import io
from typing import Any

from jinja2 import Environment

_FRAME = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .2rem .7rem; border-bottom: 1px solid #8884; text-align: right; }
td:first-child, th:first-child, td:last-child, th:last-child { text-align: left; }
tr.best { font-weight: 600; }
td.text { text-align: left; overflow-wrap: anywhere; }
figure { margin: 1rem 0; background: #fff; padding: .5rem; border-radius: 6px; }
figure svg { max-width: 100%; height: auto; }
figcaption { color: #444; }
.wide { overflow-x: auto; }
</style></head><body>
"""


def render_page(body: str, title: str, filters: dict[str, Any] | None = None, **values: Any) -> str:
    """A whole page from the template of its body; what goes into it is escaped."""
    environment = Environment(autoescape=True, keep_trailing_newline=True)
    environment.filters |= filters or {}
    template = environment.from_string(_FRAME + body + "</body></html>\n")
    return template.render(title=title, **values)


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
