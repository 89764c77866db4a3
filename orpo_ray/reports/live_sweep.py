"""Following a sweep while it runs, from its trials' files alone; a thread on the driver."""

import logging
import math
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.table import Table

from orpo_ray.reports.live import live_display
from orpo_ray.runs.sweep import Goal, Trial, read_trials

_POLL_S = 2.0
_log = logging.getLogger(__name__)


class SweepWatcher:
    """Logs a line for every evaluation of a trial; a terminal shows a live table instead.

    Args:
        directory: of the sweep.
        goal: what the trials are ranked by.
        console: shows the table if it is a terminal. Default: trials are only logged.
    """

    def __init__(self, directory: Path, goal: Goal, console: Console | None = None) -> None:
        self._directory = directory
        self._goal = goal
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="orpo-sweep", daemon=True)
        self._live = live_display(console, None, refresh_per_second=1)
        self._shown: dict[str, str] = {}

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        if self._live:
            self._live.stop()

    def _watch(self) -> None:
        while not self._ended.wait(_POLL_S):
            self._show()
        self._show()

    def _show(self) -> None:
        trials = read_trials(self._directory)
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
    table = Table(*["trial", *settings, "step", *columns, "status"])
    for trial in trials:
        running = not trial.finished and trial.failure is None
        table.add_row(
            trial.name,
            *[_figure(trial.values.get(name)) for name in settings],
            str(_step(trial)),
            *[_figure(trial.last(name)) for name in columns],
            "" if running else trial.status,
        )
    return table


def trial_text(trial: Trial, goal: Goal, with_status: bool = True) -> str:
    """A trial on one line: its values and its last evaluation."""
    values = ", ".join(f"{name}={_figure(value)}" for name, value in trial.values.items())
    step = max((step for step, _ in trial.evaluations(goal.metric)), default=_step(trial))
    metrics = dict.fromkeys(
        (goal.metric, f"{goal.prefix}rewards/margins", f"{goal.prefix}nll_loss")
    )
    figures = "  ".join(f"{name} {_figure(trial.last(name))}" for name in metrics)
    status = f"  {trial.status}" if with_status else ""
    failure = f": {trial.failure}" if with_status and trial.failure else ""
    return f"trial {trial.name} ({values}) step {step}  {figures}{status}{failure}"


def _step(trial: Trial) -> int:
    return max((int(line["step"]) for line in trial.lines), default=0)


def _figure(value: object) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return str(value)
