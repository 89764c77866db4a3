"""The status of a run or a sweep: a table, lines for a file, or JSON."""

import dataclasses
import io
import json
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from orpo_ray.reports.terminal import as_text
from orpo_ray.runs.files import EVENTS
from orpo_ray.runs.formatting import (
    format_duration,
    format_metric,
    format_rows,
    format_settings,
)
from orpo_ray.runs.metrics import BY_KEY, BY_NAME
from orpo_ray.runs.status import RunStatus, read_status
from orpo_ray.storage.folder import FolderLike
from orpo_ray.storage.hiding import hide

_FILE_WIDTH = 10_000


def show_status(directory: FolderLike, as_json: bool, console: Console | None = None) -> None:
    """Print the status of the run or the sweep in a directory.

    Raises:
        ConfigError: when it is neither.
    """
    status = read_status(directory)
    console = console or Console(highlight=False, soft_wrap=True)
    if as_json:
        _print_plain(console, hide(json.dumps(dataclasses.asdict(status), indent=1)))
        return
    if isinstance(status, RunStatus):
        _print_table(console, (), run_rows(status))
        return
    has = {True: "is running", False: "has ended", None: "was on another machine"}[status.is_alive]
    driver = f"{status.driver}, which {has}" if status.driver else "none is known"
    head = [("sweep", f"{status.name}, {status.directory}"), ("driver", driver)]
    _print_table(console, (), head)
    _print_table(console, *trial_table(status.trials))


def run_rows(status: RunStatus) -> list[tuple[str, str]]:
    """Name and text of each line of a run's status."""
    rows = [("run", f"{status.name}, {status.directory}"), ("state", _state_text(status))]
    if status.values:
        rows.append(("trial", format_settings(status.values)))
    rows.append(("progress", _progress_text(status)))
    if status.training:
        metrics = (BY_KEY[key].text(value) for key, value in status.training.items())
        rows.append(("training", "  ".join(metrics)))
    for evaluation in status.evaluations:
        name = f"{evaluation['set']} " if evaluation["set"] else ""
        pairs = f" on {evaluation['pairs']} pairs" if evaluation["pairs"] else ""
        metrics = (_estimate_text(key, value) for key, value in evaluation["figures"].items())
        text = f"{name}at step {evaluation['step']}{pairs}: {'  '.join(metrics)}"
        rows.append(("evaluation", text))
    rows.append(("checkpoint", _checkpoint_text(status)))
    rows += [("", f"step {old['step']} is unusable: {old['reason']}") for old in status.passed_over]
    rows += [("data", f"{name}: {format_rows(part)}") for name, part in status.data.items()]
    rows.append(("events", _events_text(status)))
    model = status.model
    rows.append(("model", f"{model['folder']}, of step {model['step']}" if model else "none yet"))
    return rows


def trial_table(trials: Sequence[RunStatus]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A heading and a row for each trial of a sweep."""
    metrics = [BY_NAME[name] for name in ("loss", "rewards/accuracies", "log_odds_chosen")]
    labels = [metric.label for metric in metrics]
    heading = ("trial", "values", "state", "step", *labels, "held-out", "logged")
    rows = []
    for trial in trials:
        known = trial.training
        shown = [format_metric(known[m.key], m.form) if m.key in known else "-" for m in metrics]
        accuracy = BY_NAME["rewards/accuracies"]
        held_out = [evaluation["figures"][accuracy.key][0] for evaluation in trial.evaluations]
        rows.append(
            (
                trial.name,
                format_settings(trial.values) or "-",
                f"failed: {trial.failure}" if trial.failure else trial.state,
                _step_text(trial),
                *shown,
                " ".join(format_metric(value, accuracy.form) for value in held_out) or "-",
                f"{format_duration(trial.logged_s)} ago" if trial.logged_s is not None else "-",
            )
        )
    return heading, rows


def _state_text(status: RunStatus) -> str:
    text = status.state + (f": {status.failure}" if status.failure else "")
    if status.driver and status.state in ("training", "starting"):
        text += f", by {status.driver}"
    elif status.driver and status.state in ("stopped", "unknown"):
        text += f"; the last driver was {status.driver}"
    if status.logged_s is not None:
        text += f"; last logged {format_duration(status.logged_s)} ago"
    if status.quiet_s is not None:
        text += f"; nothing was written for {format_duration(status.quiet_s)}, which is long"
    return text


def _progress_text(status: RunStatus) -> str:
    epoch = f", epoch {status.epoch:.3g}" if status.epoch is not None else ""
    left = f", about {format_duration(status.left_s)} left" if status.left_s is not None else ""
    return f"step {_step_text(status)}{epoch}{left}"


def _step_text(status: RunStatus) -> str:
    done = "0" if status.step is None else str(status.step)
    return f"{done} of {status.n_steps}" if status.n_steps is not None else done


def _estimate_text(key: str, estimate: Sequence[float | None]) -> str:
    metric, (value, *interval) = BY_KEY[key], estimate
    bounds = " to ".join(format_metric(bound, metric.form) for bound in interval)
    return f"{metric.text(value)} ({bounds})" if bounds else metric.text(value)


def _checkpoint_text(status: RunStatus) -> str:
    found = status.checkpoint
    if found is None:
        return "none"
    age = format_duration(found["age_s"])
    return f"step {found['step']}, {age} old; {found['checked']} are intact"


def _events_text(status: RunStatus) -> str:
    counts = ", ".join(f"{kind} {count}" for kind, count in sorted(status.events.items()))
    last = status.last_event
    if last is None:
        return "none"
    age = format_duration(last["age_s"])
    return f"{counts or 'none counted'} ({EVENTS}); last {age} ago: {last['text']}"


def _print_table(console: Console, heading: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print in columns: on a terminal folded to its width, in a file a line a row."""
    table = Table.grid(padding=(0, 2))
    for cells in ([heading] if heading else []) + [*rows]:
        table.add_row(*map(as_text, cells))
    if console.is_terminal:
        console.print(table)
        return
    file = io.StringIO()
    Console(file=file, width=_FILE_WIDTH).print(table)
    for line in file.getvalue().splitlines():
        _print_plain(console, line.rstrip())


def _print_plain(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)
