"""The curves of a run, drawn from the lines of its metrics; on the driver."""

import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from orpo_ray.reports.page import make_axes, svg_of
from orpo_ray.runs.metrics import METRICS, eval_prefixes, set_name
from orpo_ray.storage.files import write_atomic

CURVES = "curves.png"
_COLUMNS, _WIDTH, _HEIGHT = 3, 3.7, 2.5
_MOST_MARKED, _MOST_STRETCHES = 60, 1000
_SHAPES = "osD^vP*X"
_LINE_COLOURS = ("tab:blue", "tab:orange", "tab:purple", "tab:cyan", "tab:pink", "tab:olive")
_SIDES = {"logps/chosen": "tab:green", "logps/rejected": "tab:red"}

Lines = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Chart:
    """Metrics over the steps, on the same axes.

    Args:
        title: with the unit.
        metrics: their names in training; in evaluation they follow the prefix of the set.
        baseline: the value of the metric when nothing was learned, drawn as a line.
    """

    title: str
    metrics: tuple[str, ...]
    baseline: float | None = None


def charts_of(group: str) -> tuple[Chart, ...]:
    """The charts of a group, in the order of the catalogue."""
    shown = [metric for metric in METRICS if metric.chart == group]
    titles = dict.fromkeys(metric.heading for metric in shown)
    parts = {title: [m for m in shown if m.heading == title] for title in titles}
    return tuple(
        Chart(title, tuple(m.name for m in metrics), metrics[0].baseline)
        for title, metrics in parts.items()
    )


LEARNING, THROUGHPUT = charts_of("learning"), charts_of("throughput")


def all_prefixes(lines: Lines) -> list[str]:
    """The prefixes of the evaluation sets of a run, in their order."""
    return list(dict.fromkeys(prefix for line in lines for prefix in eval_prefixes(line)))


def set_label(prefix: str) -> str:
    """The label of an evaluation set: its name, if it has one."""
    return set_name(prefix) or "evaluation"


def chart_svgs(charts: Iterable[Chart], lines: Lines) -> list[str]:
    """Every chart that has a point, as an SVG element; its lines have their metric as `id`."""
    svgs, prefixes = [], all_prefixes(lines)
    for chart in _with_points(charts, lines, prefixes):
        figure, (axis,) = make_axes(1, _WIDTH, _HEIGHT)
        _draw(axis, chart, lines, prefixes)
        svgs.append(svg_of(figure))
    return svgs


def write_picture(path: Path, lines: Lines) -> None:
    """All charts as one PNG; nothing before the first metrics."""
    figure = picture(lines)
    if figure is None:
        return
    write_atomic(path, _png(figure))


def _png(figure: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


def picture(lines: Lines) -> Any:
    """All charts as one matplotlib figure, which notebooks show; None before the first metrics."""
    prefixes = all_prefixes(lines)
    charts = _with_points((*LEARNING, *THROUGHPUT), lines, prefixes)
    if not charts:
        return None
    n_rows = math.ceil(len(charts) / _COLUMNS)
    size = (_COLUMNS * _WIDTH, n_rows * _HEIGHT)
    figure, axes = make_axes(_COLUMNS, *size, n_rows)
    for axis in axes[len(charts) :]:
        axis.set_axis_off()
    for axis, chart in zip(axes, charts, strict=False):
        _draw(axis, chart, lines, prefixes)
    # Notebooks know figures of pyplot by themselves, and others by this method.
    figure._repr_png_ = partial(_png, figure)
    return figure


def _with_points(charts: Iterable[Chart], lines: Lines, prefixes: Sequence[str]) -> list[Chart]:
    drawn = {name for line in lines for name, value in line.items() if value is not None}
    return [c for c in charts if any(p + m in drawn for p in ("", *prefixes) for m in c.metrics)]


def _points(lines: Lines, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric; NaN, which breaks a line, where it was not finite.

    Of more points than a chart has pixels, those that shape it are kept: the least and the largest
    value of each stretch, and what is not finite.
    """
    logged = [(line["step"], line[name]) for line in lines if name in line]
    values = [math.nan if value is None else float(value) for _, value in logged]
    steps = [step for step, _ in logged]
    if len(steps) <= 2 * _MOST_STRETCHES:
        return steps, values
    edges = [len(steps) * i // _MOST_STRETCHES for i in range(_MOST_STRETCHES + 1)]
    kept: set[int] = set()
    for low, high in itertools.pairwise(edges):
        stretch = range(low, high)
        finite = [i for i in stretch if not math.isnan(values[i])]
        if len(finite) < len(stretch):
            kept.add(next(i for i in stretch if math.isnan(values[i])))
        if finite:
            kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
    places = sorted(kept)
    return [steps[i] for i in places], [values[i] for i in places]


def _draw(axis: Any, chart: Chart, lines: Lines, prefixes: Sequence[str]) -> None:
    if chart.baseline is not None:
        axis.axhline(chart.baseline, color="0.5", linewidth=0.8, linestyle=":")
    for metric in chart.metrics:
        for rank, prefix in enumerate(("", *prefixes)):
            steps, values = _points(lines, prefix + metric)
            if all(math.isnan(value) for value in values):
                continue
            colour = _SIDES.get(metric, _LINE_COLOURS[rank % len(_LINE_COLOURS)])
            side = f"{metric.removeprefix('logps/')}, " if metric in _SIDES else ""
            label = side + (set_label(prefix) if prefix else "training")
            style = _style(rank, len(values) <= _MOST_MARKED)
            axis.plot(steps, values, label=label, color=colour, gid=prefix + metric, **style)
    axis.set_title(chart.title, fontsize=9)
    axis.set_xlabel("step", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.locator_params(axis="x", integer=True)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if len(axis.get_legend_handles_labels()[0]) > 1:
        axis.legend(fontsize=6.5, framealpha=0.6, labelspacing=0.25)


def _style(rank: int, is_marked: bool) -> dict[str, Any]:
    """Training is a thin line; evaluations, further apart, lie over it."""
    if rank == 0:
        return {"linewidth": 1.2, "alpha": 0.75, "marker": "." if is_marked else None}
    marker = _SHAPES[(rank - 1) % len(_SHAPES)] if is_marked else None
    return {"linewidth": 1.4, "linestyle": "--", "marker": marker, "markersize": 4.5, "zorder": 3}
