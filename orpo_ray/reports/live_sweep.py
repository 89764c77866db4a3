"""A sweep on the terminal while it runs, from its files alone; in a thread on the driver."""

from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from orpo_ray.reports.live import Watcher
from orpo_ray.runs.formatting import format_metric, format_setting, format_settings
from orpo_ray.runs.sweep import Goal, Trial, read_trials

_POLL_S = 2.0


class SweepWatcher(Watcher):
    """Shows the trials of a sweep: a table in place, or a line for every evaluation."""

    def __init__(self, directory: Path, goal: Goal, console: Console) -> None:
        live = Live(console=console, refresh_per_second=1, transient=True)
        super().__init__(console, _POLL_S, live)
        self._directory, self._goal = directory, goal
        self._shown: dict[str, str] = {}

    def _show_new(self) -> None:
        trials = read_trials(self._directory)
        if self._console.is_terminal:
            self._live.update(leaderboard(self._goal.ranked(trials), self._goal))
            return
        for trial in trials:
            text = trial_text(trial, self._goal, with_status=False)
            if trial.evaluations(self._goal.metric) and self._shown.get(trial.name) != text:
                self._shown[trial.name] = text
                self._console.print(text, markup=False)
            if trial.failure and self._shown.get(f"{trial.name} failed") is None:
                self._shown[f"{trial.name} failed"] = trial.failure
                self._console.print(f"trial {trial.name} failed: {trial.failure}", markup=False)


def leaderboard(trials: list[Trial], goal: Goal) -> Table:
    """The trials as they stand, the best first."""
    settings = list(dict.fromkeys(name for trial in trials for name in trial.values))
    columns = [goal.metric, f"{goal.prefix}nll_loss"]
    table = Table(*["trial", *settings, "step", *columns, "status"])
    for trial in trials:
        running = not trial.finished and trial.failure is None
        table.add_row(
            trial.name,
            *[format_setting(trial.values.get(name)) for name in settings],
            str(_step(trial)),
            *[format_metric(trial.last(name), ".4g") for name in columns],
            "" if running else trial.status,
        )
    return table


def trial_text(trial: Trial, goal: Goal, with_status: bool = True) -> str:
    """A trial on one line: its values and its last evaluation."""
    step = max((step for step, _ in trial.evaluations(goal.metric)), default=_step(trial))
    names = dict.fromkeys((goal.metric, f"{goal.prefix}rewards/margins", f"{goal.prefix}nll_loss"))
    metrics = "  ".join(f"{name} {format_metric(trial.last(name), '.4g')}" for name in names)
    status = f"  {trial.status}" if with_status else ""
    failure = f": {trial.failure}" if with_status and trial.failure else ""
    values = format_settings(trial.values)
    return f"trial {trial.name} ({values}) step {step}  {metrics}{status}{failure}"


def _step(trial: Trial) -> int:
    return max((int(line["step"]) for line in trial.lines), default=0)
