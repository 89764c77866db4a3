"""Following a sweep while it runs, from its files alone; in a thread on the driver."""

import logging
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from orpo_ray.reports.live import Watcher
from orpo_ray.reports.terminal import as_text
from orpo_ray.runs.files import METRICS, NewLines
from orpo_ray.runs.formatting import format_metric, format_setting, format_settings
from orpo_ray.runs.sweep import Goal, Trial, read_trials

_POLL_S = 2.0
_log = logging.getLogger(__name__)


class SweepWatcher(Watcher):
    """Logs a line for every evaluation of a trial; a terminal shows a live table instead.

    Args:
        directory: of the sweep.
        goal: what the trials are ranked by.
        console: shows the table if it is a terminal. Default: trials are only logged.
    """

    def __init__(self, directory: Path, goal: Goal, console: Console | None = None) -> None:
        super().__init__(console, None, _POLL_S, refresh_per_second=1)
        self._directory, self._goal = directory, goal
        self._shown: dict[str, str] = {}
        self._read: dict[Path, tuple[NewLines, list[dict[str, Any]]]] = {}

    def _lines(self, trial: Path) -> list[dict[str, Any]]:
        """The metrics of a trial, of which only what is new is read."""
        new, lines = self._read.setdefault(trial, (NewLines(trial / METRICS), []))
        found, are_all = new.read()
        if are_all:
            lines.clear()
        lines += found
        return lines

    def _show_new(self) -> None:
        trials = read_trials(self._directory, self._lines)
        if self._live:
            self._live.update(leaderboard(self._goal.ranked(trials), self._goal))
            return
        for trial in trials:
            text = trial_text(trial, self._goal, with_status=False)
            if trial.evaluations(self._goal.metric) and self._shown.get(trial.name) != text:
                self._shown[trial.name] = text
                _log.info(text)
            if trial.failure and self._shown.get(f"{trial.name} failed") is None:
                self._shown[f"{trial.name} failed"] = trial.failure
                _log.info("trial %s failed: %s", trial.name, trial.failure)


def leaderboard(trials: list[Trial], goal: Goal) -> Table:
    """The trials as they stand, the best first."""
    settings = list(dict.fromkeys(name for trial in trials for name in trial.values))
    columns = [goal.metric, f"{goal.prefix}nll_loss"]
    table = Table()
    for heading in ("trial", *settings, "step", *columns, "status"):
        table.add_column(as_text(heading))
    for trial in trials:
        table.add_row(
            as_text(trial.name),
            *[as_text(format_setting(trial.values.get(name))) for name in settings],
            str(_step(trial)),
            *[format_metric(trial.last(name), ".4g") for name in columns],
            as_text("" if trial.status == "unfinished" else trial.status),
        )
    return table


def trial_text(trial: Trial, goal: Goal, with_status: bool = True) -> str:
    """A trial on one line: its values and its last evaluation."""
    step = max((step for step, _ in trial.evaluations(goal.metric)), default=_step(trial))
    names = dict.fromkeys((goal.metric, f"{goal.prefix}log_odds_chosen", f"{goal.prefix}nll_loss"))
    metrics = "  ".join(f"{name} {format_metric(trial.last(name), '.4g')}" for name in names)
    status = f"  {trial.status}" if with_status else ""
    failure = f": {trial.failure}" if with_status and trial.failure else ""
    values = format_settings(trial.values)
    return f"trial {trial.name} ({values}) step {step}  {metrics}{status}{failure}"


def _step(trial: Trial) -> int:
    return max((int(line["step"]) for line in trial.lines), default=0)
