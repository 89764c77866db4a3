"""A run on a terminal: its progress, its curves in one line each, its last evaluation; driver."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH = 40
_CURVES = {"margin": "rewards/margins", "accuracy": "rewards/accuracies"}


class LiveView:
    """What is shown in place while a run goes on.

    Args:
        n_steps: optimizer steps of the whole run.
    """

    def __init__(self, n_steps: int) -> None:
        self._progress = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(compact=True),
        )
        self._task = self._progress.add_task("starting workers", total=n_steps)
        self._curves: dict[str, list[float | None]] = {name: [] for name in _CURVES}
        self._evaluations: dict[str, str] = {}

    def add(self, line: dict[str, Any], text: str) -> None:
        """Take up a logged step, and what is said of it beside the bar."""
        self._progress.update(self._task, completed=line["step"], description=text)
        for name, metric in _CURVES.items():
            self._curves[name].append(line[metric])

    def add_evaluation(self, prefix: str, text: str) -> None:
        """Take up the last evaluation of a set."""
        self._evaluations[prefix] = text

    def __rich__(self) -> RenderableType:
        table = Table.grid(padding=(0, 1))
        for name, values in self._curves.items():
            if values:
                last = values[-1]
                shown = "not finite" if last is None else f"{last:.4f}"
                table.add_row(name, sparkline(values, _WIDTH), shown)
        return Group(self._progress, table, *self._evaluations.values())


def sparkline(values: Sequence[float | None], width: int) -> str:
    """Values as blocks between their least and their greatest; blanks where none is finite.

    Args:
        values: in their order; None for those that are not finite.
        width: most characters; more values than that are averaged, stretch by stretch.
    """
    n = min(width, len(values))
    edges = [len(values) * i // n for i in range(n + 1)] if n else []
    means = [_mean(values[low:high]) for low, high in itertools.pairwise(edges)]
    known = [mean for mean in means if not math.isnan(mean)]
    if not known:
        return " " * n
    least, span = min(known), max(known) - min(known)
    scale = (len(_BLOCKS) - 1) / span if span else 0.0
    return "".join(
        " " if math.isnan(mean) else _BLOCKS[round((mean - least) * scale)] for mean in means
    )


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan
