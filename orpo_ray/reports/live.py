"""Following a run while it trains, from its files alone; in a thread on the driver."""

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orpo_ray.reports.terminal import draws_in_place
from orpo_ray.runs.files import LOG, METRICS, STOP, NewLines, read_metrics
from orpo_ray.runs.formatting import format_duration, format_metric
from orpo_ray.runs.metrics import (
    BY_NAME,
    EVALUATION_SUMMARY,
    TRAINING_SUMMARY,
    eval_prefixes,
    set_name,
)
from orpo_ray.storage.files import one_line
from orpo_ray.storage.hiding import printable

_log = logging.getLogger(__name__)

_POLL_S = 0.3
# The page of a run is refreshed at most this often, and for at most this share of the time.
_REFRESH_S, _REFRESH_SHARE = 30.0, 0.02
_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH, _MOST_VALUES = 40, 2000
_CURVES = (BY_NAME["log_odds_chosen"], BY_NAME["rewards/accuracies"])


class Watcher:
    """Polls files in a thread and shows what is new: in place on a terminal, else by logging.

    Args:
        console: shows `content` in place if it is a terminal. Default: everything is logged.
        content: of the live display.
        poll_s: seconds between two polls.
        refresh_per_second: of the live display.
    """

    def __init__(
        self,
        console: Console | None,
        content: RenderableType | None,
        poll_s: float,
        refresh_per_second: float,
    ) -> None:
        self._poll_s = poll_s
        self._live: Live | None = None
        if console is not None and draws_in_place(console):
            self._live = Live(
                content, console=console, refresh_per_second=refresh_per_second, transient=True
            )
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="orpo-progress", daemon=True)

    def __enter__(self) -> Self:
        if self._live:
            _try(self._live.start)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        try:
            self._thread.join()
            self._close(error)
        finally:
            if self._live:
                _try(self._live.stop)

    def _watch(self) -> None:
        while not self._ended.wait(self._poll_s):
            _try(self._poll)
        _try(self._show_new)

    def _poll(self) -> None:
        self._show_new()

    def _show_new(self) -> None:
        """Show what was added since the last call."""
        raise NotImplementedError

    def _close(self, error: BaseException | None) -> None:
        """Called once after the last poll, with the error that ended the `with` block."""


class RunWatcher(Watcher):
    """Logs what is new in the log and the metrics of a run; a terminal shows a live view instead.

    Args:
        directory: of the run.
        n_steps: optimizer steps of the whole run.
        console: shows the live view if it is a terminal. Default: progress is only logged.
        write_report: called from time to time while there are new metrics, and when the run fails.
        log: called with every line of the metrics, also those of an earlier attempt.
        first_report_s: seconds before the first call of `write_report`. Importing matplotlib takes
            seconds of CPU time, which would slow down a short run.
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
        self._view = LiveView(n_steps)
        super().__init__(console, self._view, _POLL_S, refresh_per_second=4)
        self._directory, self._n_steps = directory, n_steps
        self._write_report, self._log = write_report, log
        self._report_is_old, self._refresh_at = False, time.monotonic() + first_report_s
        # Where a run resumes, only what is new is shown.
        self._shown_step = max((line["step"] for line in read_metrics(directory)), default=-1)
        self._logged_step = -1
        self._log_offset = self._size(LOG)
        # Lines that are there already are read once workers have cut off those of steps that are
        # done again, and at the end.
        self._metrics = NewLines(directory / METRICS)
        self._metrics_seen = self._size(METRICS)
        self._stop_shown = False
        self._started_at: tuple[int, float] | None = None

    def _poll(self) -> None:
        self._show_new()
        if self._report_is_old and time.monotonic() >= self._refresh_at:
            self._refresh()

    def _close(self, error: BaseException | None) -> None:
        self._metrics_seen = -1
        self._show_new()
        # Whoever presses Ctrl-C twice does not wait for a page.
        if isinstance(error, Exception) and self._shown_step >= 0:
            self._refresh()

    def _refresh(self) -> None:
        """Write the page of the run, and schedule the next time."""
        if self._write_report is None:
            return
        started = time.monotonic()
        try_report(self._write_report)
        now = time.monotonic()
        self._report_is_old = False
        self._refresh_at = now + max(_REFRESH_S, (now - started) / _REFRESH_SHARE)

    def _size(self, name: str) -> int:
        path = self._directory / name
        return path.stat().st_size if path.exists() else 0

    def _show_new(self) -> None:
        if self._size(LOG) > self._log_offset:
            with (self._directory / LOG).open(encoding="utf-8", errors="replace") as file:
                file.seek(self._log_offset)
                for text in file.read().splitlines():
                    _log.info(text)
                self._log_offset = file.tell()
        if not self._stop_shown and (self._directory / STOP).exists():
            self._stop_shown = True
            _log.info("stopping once a checkpoint of this step is saved; Ctrl-C ends at once")
        if self._size(METRICS) == self._metrics_seen:
            return
        self._metrics_seen = self._size(METRICS)
        self._report_is_old = True
        for line in self._metrics.read()[0]:
            if line["step"] > self._logged_step:
                self._logged_step = line["step"]
                self._log(line)
            if line["step"] > self._shown_step:
                self._shown_step = line["step"]
                _try(partial(self._show, line))

    def _show(self, line: dict[str, Any]) -> None:
        for prefix in eval_prefixes(line):
            text = evaluation_text(line, prefix)
            _log.info(text)
            self._view.add_evaluation(prefix, text)
        if "loss" not in line:
            return
        left_s = self._left_s(line["step"])
        if self._live:
            self._view.add(line, left_s)
        else:
            eta = "" if left_s is None else f"  eta {format_duration(left_s)}"
            _log.info("step %s/%s  %s%s", line["step"], self._n_steps, training_text(line), eta)

    def _left_s(self, step: int) -> float | None:
        """Time left at the pace since the first line that was shown, which itself has none."""
        now = time.monotonic()
        if self._started_at is None:
            self._started_at = (step, now)
            return None
        first_step, first_time = self._started_at
        return (now - first_time) / (step - first_step) * (self._n_steps - step)


class LiveView:
    """Progress, curves and last evaluations of a run, drawn in place.

    The first line begins with the step, the time left and the loss: a narrow terminal cuts the
    other metrics.

    Args:
        n_steps: optimizer steps of the whole run.
    """

    def __init__(self, n_steps: int) -> None:
        self._n_steps = n_steps
        self._step, self._left, self._text = 0, "-:--:--", "starting workers"
        self._curves = {metric.name: Curve() for metric in _CURVES}
        self._evaluations: dict[str, str] = {}

    def add(self, line: dict[str, Any], left_s: float | None) -> None:
        """Add a logged step, and the time left if it is known."""
        self._step, self._text = line["step"], training_text(line)
        if left_s is not None:
            self._left = str(timedelta(seconds=round(left_s)))
        for name, curve in self._curves.items():
            if name in line:
                curve.add(line[name])

    def add_evaluation(self, prefix: str, text: str) -> None:
        """Set the text of a set's last evaluation."""
        self._evaluations[prefix] = text

    def __rich__(self) -> RenderableType:
        table = Table.grid(padding=(0, 1))
        for metric in _CURVES:
            curve = self._curves[metric.name]
            if curve.values:
                last = format_metric(curve.last, metric.form)
                table.add_row(metric.label, sparkline(curve.values, _WIDTH), last)
        first = f"step {self._step}/{self._n_steps}  {self._left} left  {self._text}"
        bar = Table.grid()  # which ends the line, as a bar alone does not
        bar.add_row(ProgressBar(self._n_steps, self._step, width=_WIDTH))
        return Group(_cut(first), bar, table, *map(_cut, self._evaluations.values()))


class Curve:
    """Values to be drawn, however many there are: of many, means of several.

    Args:
        values: at most 2,000 of them; None for those that are not finite.
        last: the last one that was added.
    """

    def __init__(self) -> None:
        self.values: list[float | None] = []
        self.last: float | None = None
        self._width, self._waiting = 1, list[float | None]()

    def add(self, value: float | None) -> None:
        """Add the next value."""
        self.last = value
        self._waiting.append(value)
        if len(self._waiting) < self._width:
            return
        self.values.append(_mean_or_none(self._waiting))
        self._waiting = []
        if len(self.values) == _MOST_VALUES:
            pairs = zip(self.values[::2], self.values[1::2], strict=True)
            self.values = [_mean_or_none(pair) for pair in pairs]
            self._width *= 2


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    mean = _mean(values)
    return None if math.isnan(mean) else mean


def _cut(line: str) -> Text:
    """A line that is cut where the terminal ends."""
    return Text(printable(line), no_wrap=True, overflow="ellipsis")


def _try(show: Callable[[], object]) -> None:
    """Show something, which decides nothing.

    An error of a console or of a handler of the log is not the run's, nor is the exit that rich
    makes of a closed pipe.
    """
    try:
        show()
    except (Exception, SystemExit) as error:
        _log.debug("not shown: %s", error)


def sparkline(values: Sequence[float | None], width: int) -> str:
    """Values as blocks between their minimum and maximum; blanks where none is finite.

    Args:
        values: in their order; None for those that are not finite.
        width: maximum number of characters; more values than that are averaged in stretches.
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


def try_report(write_report: Callable[[], object]) -> None:
    """Write the page of a run; an error in plotting is logged, and must not fail the run."""
    try:
        write_report()
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        _log.warning("report.html was not written: %s", reason)


def training_text(line: Mapping[str, Any]) -> str:
    """The metrics of a logged step on one line; of two answers, where both were computed."""
    known = (metric for metric in TRAINING_SUMMARY if metric.name in line)
    return "  ".join(metric.text(line[metric.name]) for metric in known)


def evaluation_text(line: Mapping[str, Any], prefix: str) -> str:
    """The metrics of one evaluation set on one line."""
    name = f" of {set_name(prefix)}" if set_name(prefix) else ""
    metrics = "  ".join(metric.text(line[prefix + metric.name]) for metric in EVALUATION_SUMMARY)
    return f"evaluation{name} at step {line['step']}: {metrics}"
