"""What `jobs/status.py` prints of a run or a sweep: a table, lines for a file, or JSON."""

import dataclasses
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from orpo_ray.runs.files import EVENTS
from orpo_ray.runs.metrics import figure
from orpo_ray.runs.status import RunStatus, read_status

_FILE_WIDTH = 10_000
_FORMS = {"accuracy": ".3f", "pairs_per_s": ".1f", "tokens_per_s": ".0f"}
_UNITS = {"pairs_per_s": "{} pairs/s", "tokens_per_s": "{} tokens/s"}


def show_status(directory: Path, as_json: bool, console: Console | None = None) -> None:
    """Print where the run or the sweep of a directory stands.

    Raises:
        ConfigError: when it is neither.
    """
    status = read_status(directory)
    console = console or Console(highlight=False, soft_wrap=True)
    if as_json:
        _print_plain(console, json.dumps(dataclasses.asdict(status), indent=1))
        return
    if isinstance(status, RunStatus):
        _print_table(console, (), run_rows(status))
        return
    has = {True: "has it", False: "has ended", None: "was on another machine"}[status.is_alive]
    told = f"{status.driver}, which {has}" if status.driver else "none is known"
    head = [("sweep", f"{status.name}, {status.directory}"), ("driver", told)]
    _print_table(console, (), head)
    _print_table(console, *trial_table(status.trials))


def run_rows(status: RunStatus) -> list[tuple[str, str]]:
    """What is said of a run: what each line is about, and the line."""
    rows = [("run", f"{status.name}, {status.directory}"), ("state", _state_text(status))]
    if status.values:
        rows.append(("trial", _values_text(status.values)))
    rows.append(("progress", _progress_text(status)))
    if status.training:
        rows.append(("training", _figures_text(status.training)))
    for evaluation in status.evaluations:
        name = f"{evaluation['set']} " if evaluation["set"] else ""
        pairs = f" on {evaluation['pairs']} pairs" if evaluation["pairs"] else ""
        figures = "  ".join(_estimate_text(n, v) for n, v in evaluation["figures"].items())
        rows.append(("evaluation", f"{name}at step {evaluation['step']}{pairs}: {figures}"))
    rows.append(("checkpoint", _checkpoint_text(status)))
    rows += [("", f"step {old['step']} is none: {old['reason']}") for old in status.passed_over]
    rows += [("data", _data_text(name, part)) for name, part in status.data.items()]
    rows.append(("events", _events_text(status)))
    model = status.model
    rows.append(("model", f"{model['folder']}, of step {model['step']}" if model else "none yet"))
    return rows


def trial_table(trials: Sequence[RunStatus]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A heading and a row for each trial of a sweep."""
    figures = ("loss", "accuracy", "margin")
    heading = ("trial", "values", "state", "step", *figures, "held-out", "logged")
    rows = []
    for trial in trials:
        known, held_out = trial.training, [e["figures"]["accuracy"][0] for e in trial.evaluations]
        shown = [_figure(name, known[name]) if known else "-" for name in figures]
        rows.append(
            (
                trial.name,
                _values_text(trial.values),
                f"failed: {trial.failure}" if trial.failure else trial.state,
                _step_text(trial),
                *shown,
                " ".join(_figure("accuracy", value) for value in held_out) or "-",
                f"{span(trial.logged_s)} ago" if trial.logged_s is not None else "-",
            )
        )
    return heading, rows


def span(seconds: float) -> str:
    """A time in the two largest units that say something."""
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if minutes < 1:
        return f"{int(seconds)} s"
    if hours < 1:
        return f"{minutes} min {int(seconds) % 60} s"
    if hours < 48:
        return f"{hours} h {minutes % 60} min"
    return f"{hours // 24} days"


def _state_text(status: RunStatus) -> str:
    text = status.state + (f": {status.failure}" if status.failure else "")
    if status.driver and status.state in ("training", "starting"):
        text += f", by {status.driver}"
    elif status.driver and status.state in ("stopped", "not heard of"):
        text += f"; the last driver was {status.driver}"
    if status.logged_s is not None:
        text += f"; last logged {span(status.logged_s)} ago"
    if status.quiet_s is not None:
        text += f"; nothing was written for {span(status.quiet_s)}, which is long"
    return text


def _progress_text(status: RunStatus) -> str:
    epoch = f", epoch {status.epoch:.3g}" if status.epoch is not None else ""
    left = f", about {span(status.left_s)} left" if status.left_s is not None else ""
    return f"step {_step_text(status)}{epoch}{left}"


def _step_text(status: RunStatus) -> str:
    done = "0" if status.step is None else str(status.step)
    return f"{done} of {status.n_steps}" if status.n_steps is not None else done


def _figures_text(figures: Mapping[str, float | None]) -> str:
    known = {name: _figure(name, value) for name, value in figures.items()}
    return "  ".join(_UNITS.get(name, f"{name} {{}}").format(text) for name, text in known.items())


def _figure(name: str, value: float | None) -> str:
    return figure(value, _FORMS.get(name, ".4f"))


def _estimate_text(name: str, estimate: Sequence[float | None]) -> str:
    value, *interval = (_figure(name, part) for part in estimate)
    text = f"{name.replace('_', ' ')} {value}"
    return f"{text} ({' to '.join(interval)})" if interval else text


def _checkpoint_text(status: RunStatus) -> str:
    found = status.checkpoint
    if found is None:
        return "none"
    return f"step {found['step']}, {span(found['age_s'])} old; {found['checked']} are right"


def _data_text(name: str, part: Mapping[str, Any]) -> str:
    if "rows_read" not in part:
        return f"{name}: held out of the training files"
    refused = part["refused"]
    reasons = ", ".join(f"{rows} {reason}" for reason, rows in refused.items())
    told = f" ({reasons})" if reasons else ""
    return f"{name}: {part['rows_read']} rows read, {sum(refused.values())} refused{told}"


def _events_text(status: RunStatus) -> str:
    counts = ", ".join(f"{kind} {count}" for kind, count in sorted(status.events.items()))
    last = status.last_event
    if last is None:
        return "none"
    return f"{counts or 'none counted'} ({EVENTS}); last {span(last['age_s'])} ago: {last['text']}"


def _values_text(values: Mapping[str, Any]) -> str:
    shown = {n: f"{v:.4g}" if isinstance(v, float) else str(v) for n, v in values.items()}
    return ", ".join(f"{name}={value}" for name, value in shown.items()) or "-"


def _print_table(console: Console, heading: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print in columns: on a terminal folded to its width, in a file a line a row."""
    table = Table.grid(padding=(0, 2))
    for cells in ([heading] if heading else []) + [*rows]:
        table.add_row(*map(Text, cells))
    if console.is_terminal:
        console.print(table)
        return
    file = io.StringIO()
    Console(file=file, width=_FILE_WIDTH).print(table)
    for line in file.getvalue().splitlines():
        _print_plain(console, line.rstrip())


def _print_plain(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)
