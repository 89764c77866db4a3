"""An evaluation on a terminal: its progress, and its estimates as tables of 80 columns."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from orpo_ray.reports.live import Watcher
from orpo_ray.reports.terminal import as_text
from orpo_ray.runs.files import NewLines
from orpo_ray.runs.statistics import Difference, Estimate, EvaluationResult, SetEvaluation

_log = logging.getLogger(__name__)
_POLL_S = 0.5
_LOGGED_SHARE = 0.1
_WIDTH = 80
_NAMES = {
    "accuracy": "accuracy",
    "length_controlled_accuracy": "length-controlled accuracy",
    "log_odds": "log odds",
    "logps_chosen": "log-prob. a token, chosen",
    "logps_rejected": "log-prob. a token, rejected",
    "perplexity": "perplexity of chosen",
}
# Of groups: what fits into 80 columns with its intervals.
_OF_GROUPS = ("accuracy", "log_odds")


class ScoringWatcher(Watcher):
    """Shows which share of the pairs is scored: in place on a terminal, else a line each tenth.

    Args:
        path: of the file that the workers write shares to.
        what: is scored.
        console: shows it in place if it is a terminal. Default: it is only logged.
    """

    def __init__(self, path: Path, what: str, console: Console | None = None) -> None:
        super().__init__(console, Text(f"{what}: starting workers"), _POLL_S, refresh_per_second=2)
        self._file, self._what, self._logged = NewLines(path), what, 0.0

    def _show_new(self) -> None:
        lines = self._file.read()[0]
        if not lines:
            return
        share = float(lines[-1]["share"])
        text = f"{self._what}: {100 * share:.0f} % of the pairs are scored"
        if self._live:
            self._live.update(Text(text))
        elif share >= min(1.0, self._logged + _LOGGED_SHARE):
            self._logged = share
            _log.info(text)


def show_evaluation(result: EvaluationResult, console: Console) -> None:
    """Print the estimates as tables, and where they are kept."""
    for name, part in result.sets.items():
        for table in _tables(name, part):
            console.print(table, "", width=min(_WIDTH, console.width))
    console.print(as_text(f"evaluation: {result.run_directory}/evaluation.json"))
    for part in result.sets.values():
        console.print(as_text(f"a row a pair: {part.scores}"))


def _tables(name: str, part: SetEvaluation) -> list[Table]:
    """Estimates of all pairs, those by group, and the differences from the baseline."""
    found = [_of_all(name, part)]
    if part.subsets or part.lengths:
        found.append(_by_group(part.subsets, part.lengths))
    if part.differences:
        found.append(_against_baseline(part))
    return found


def _of_all(name: str, part: SetEvaluation) -> Table:
    table = _table(f"{name} data, {part.pairs} pairs", "metric", "value", "95 % interval")
    for key, shown in _NAMES.items():
        if key in part.figures:
            table.add_row(shown, *_cells(part.figures[key], "#.4g"))
    return table


def _by_group(*kinds: Mapping[str, Mapping[str, Any]]) -> Table:
    heads = [_NAMES[name] for name in _OF_GROUPS]
    table = _table("with 95 % intervals", "group", "pairs", *heads)
    for column in table.columns:
        column.no_wrap = True
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
    for groups in kinds:
        table.add_section()
        for group, values in groups.items():
            cells = (_cells(values["figures"][name], ".3f") for name in _OF_GROUPS)
            texts = [f"{value} ({interval})" if interval else value for value, interval in cells]
            table.add_row(as_text(group), str(values["pairs"]), *texts)
    return table


def _against_baseline(part: SetEvaluation) -> Table:
    title = f"model less baseline, paired on {part.pairs_compared} pairs"
    table = _table(title, "metric", "difference", "95 % interval", "p")
    for key, shown in _NAMES.items():
        if key in part.differences:
            found = part.differences[key]
            table.add_row(shown, *_cells(found, "+#.4g"), f"{found.p_value:.3f}")
    return table


def _table(title: str, *heads: str) -> Table:
    return Table(
        *heads,
        title=as_text(title),
        title_justify="left",
        box=box.SIMPLE,
        collapse_padding=True,
        pad_edge=False,
        show_edge=False,
    )


def _cells(estimate: Estimate | Difference, form: str) -> tuple[str, str]:
    """Value and interval; a dash and nothing where there is none."""
    if np.isnan(estimate.value):
        return "-", ""
    numbers = (estimate.value, estimate.low, estimate.high)
    value, low, high = (format(number, form).rstrip(".") for number in numbers)
    return value, f"{low} to {high}"
