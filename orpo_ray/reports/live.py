"""Following a run while it runs, from its files alone; a thread on the driver."""

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from orpo_ray.runs.files import LOG, METRICS, read_metrics
from orpo_ray.runs.metrics import eval_prefixes, figure, set_name

_log = logging.getLogger(__name__)
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


_POLL_S = 0.3
# A run's page is written anew after so long at the earliest, and in so much of the time.
_REFRESH_S, _REFRESH_SHARE = 30.0, 0.02


class RunWatcher:
    """Logs what a run says and its progress; on a terminal the progress is a live view instead.

    Args:
        directory: of the run.
        n_steps: optimizer steps of the whole run.
        console: shows the live view if it is a terminal. Default: progress is only logged.
        write_report: called now and then while there are new figures, and when the run fails.
        log: called with every new line of the metrics.
        first_report_s: how long `write_report` waits. Its first picture takes seconds of the
            processor, which a short run would miss.
    """

    def __init__(
        self,
        directory: Path,
        n_steps: int,
        console: Console | None = None,
        write_report: Callable[[], object] | None = None,
        log: Callable[[Mapping[str, Any]], None] = lambda line: None,
        first_report_s: float = 60.0,
    ) -> None:
        self._directory = directory
        self._write_report, self._log = write_report, log
        self._report_is_old, self._refresh_at = False, time.monotonic() + first_report_s
        self._n_steps = n_steps
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="orpo-progress", daemon=True)
        # Only what is new is shown when a run directory goes on.
        self._shown_step = max((line["step"] for line in read_metrics(directory)), default=-1)
        self._log_offset = self._size(LOG)
        self._metrics_seen = 0
        self._started_at: tuple[int, float] | None = None
        self._view = LiveView(n_steps)
        self._live = live_display(console, self._view, refresh_per_second=4)

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
        if error is not None and self._shown_step >= 0:
            self._refresh()
        if self._live:
            self._live.stop()

    def _watch(self) -> None:
        while not self._ended.wait(_POLL_S):
            self._show_new()
            if self._report_is_old and time.monotonic() >= self._refresh_at:
                self._refresh()
        self._show_new()

    def _refresh(self) -> None:
        """Write the run's page; the next time is so far off that it takes little of a run."""
        if self._write_report is None:
            return
        started = time.monotonic()
        write_or_warn(self._write_report)
        now = time.monotonic()
        self._report_is_old = False
        self._refresh_at = now + max(_REFRESH_S, (now - started) / _REFRESH_SHARE)

    def _size(self, name: str) -> int:
        path = self._directory / name
        return path.stat().st_size if path.exists() else 0

    def _show_new(self) -> None:
        """Take up what was added to the log and the metrics since the last look."""
        if self._size(LOG) > self._log_offset:
            with (self._directory / LOG).open() as file:
                file.seek(self._log_offset)
                for text in file.read().splitlines():
                    _log.info(text)
                self._log_offset = file.tell()
        if self._size(METRICS) == self._metrics_seen:
            return
        self._metrics_seen = self._size(METRICS)
        self._report_is_old = True
        for line in read_metrics(self._directory):
            if line["step"] > self._shown_step:
                self._shown_step = line["step"]
                self._show(line)
                self._log(line)

    def _show(self, line: dict[str, Any]) -> None:
        for prefix in eval_prefixes(line):
            text = evaluation_text(line, prefix)
            _log.info(text)
            self._view.add_evaluation(prefix, text)
        if "loss" not in line:
            return
        text = figures_text(line)
        if self._live:
            self._view.add(line, text)
        else:
            eta = self._eta_text(line["step"])
            _log.info("step %s/%s  %s%s", line["step"], self._n_steps, text, eta)

    def _eta_text(self, step: int) -> str:
        """Time left by the pace since the first line that was shown."""
        now = time.monotonic()
        if self._started_at is None:
            self._started_at = (step, now)
            return ""
        first_step, first_time = self._started_at
        left_s = (now - first_time) / (step - first_step) * (self._n_steps - step)
        return f"  eta {int(left_s) // 60}:{int(left_s) % 60:02d}"


def live_display(
    console: Console | None, content: RenderableType | None, refresh_per_second: float
) -> Live | None:
    """A live display on a console that is a terminal; nothing is shown in place elsewhere."""
    if console is None or not console.is_terminal:
        return None
    return Live(content, console=console, refresh_per_second=refresh_per_second, transient=True)


def write_or_warn(write_report: Callable[[], object]) -> None:
    """Write a run's page, or say on one line why not: no picture may cost a run its end."""
    try:
        write_report()
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        _log.warning("report.html was not written: %s", reason)


def figures_text(line: Mapping[str, Any]) -> str:
    """The figures of a logged step on one line."""
    return (
        f"loss {figure(line['loss'])}  margin {figure(line['rewards/margins'])}  "
        f"accuracy {figure(line['rewards/accuracies'])}  lr {line['learning_rate']:.2e}  "
        f"{line['pairs_per_s']:.1f} pairs/s  {line['tokens_per_s']:.0f} tokens/s"
    )


def evaluation_text(line: Mapping[str, Any], prefix: str) -> str:
    """The figures of one evaluation set on one line."""
    name = f" of {set_name(prefix)}" if set_name(prefix) else ""
    return (
        f"evaluation{name} at step {line['step']}: "
        f"accuracy {figure(line[prefix + 'rewards/accuracies'])}  "
        f"log odds {figure(line[prefix + 'log_odds_chosen'])}  "
        f"loss {figure(line[prefix + 'loss'])}"
    )
