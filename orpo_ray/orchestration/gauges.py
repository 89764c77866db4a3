"""A run's metrics for Prometheus, through Ray's own metrics; on rank 0.

Ray serves them on every node (`MetricsExportPort`), with `ray_` before the names. They are tagged
with the run's name, those of an evaluation also with its set.
"""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.util.metrics import Gauge

from orpo_ray.runs.files import DATA_REPORT
from orpo_ray.runs.manifest import MANIFEST, checkpoint_directories
from orpo_ray.runs.metrics import METRICS, eval_prefixes, set_name
from orpo_ray.storage.files import read_json

# Name and description of the gauges of logged steps and of evaluations, by the metric they show.
TRAINED = {m.name: (f"orpo_{m.gauge}", m.help(evaluated=False)) for m in METRICS if m.gauge}
EVALUATED = {
    m.name: (f"orpo_eval_{m.gauge}", m.help(evaluated=True))
    for m in METRICS
    if m.gauge and m.is_evaluated
}
CHECKPOINT_AGE = (
    "orpo_checkpoint_age_s",
    "Seconds since the newest checkpoint was committed, at the last logged line.",
)
REFUSED_ROWS = ("orpo_refused_rows", "Rows of the data that were refused, by data set and reason.")
_RUN, _SET, _DATA, _REASON = "run", "set", "data", "reason"
# What the set of a single, unnamed evaluation is called in its tag.
UNNAMED_SET = "eval"


class RunGauges:
    """Shows every logged line of a run as gauges.

    Args:
        run_directory: whose name is the run's.
    """

    def __init__(self, run_directory: Path) -> None:
        self._directory = run_directory
        self._run = {_RUN: run_directory.name}
        self._trained = {metric: Gauge(*about, (_RUN,)) for metric, about in TRAINED.items()}
        self._evaluated = {
            metric: Gauge(*about, (_RUN, _SET)) for metric, about in EVALUATED.items()
        }
        self._age = Gauge(*CHECKPOINT_AGE, (_RUN,))
        self._refused = Gauge(*REFUSED_ROWS, (_RUN, _DATA, _REASON))
        self._show_refused()

    def show(self, line: Mapping[str, Any]) -> None:
        """Set the gauges from a line of `metrics.jsonl`.

        A value that is not finite becomes NaN, with which Ray no longer serves the gauge: a gap,
        where the last finite value would be untrue.
        """
        for metric, gauge in self._trained.items():
            if metric in line:
                gauge.set(_number(line[metric]), self._run)
        for prefix in eval_prefixes(line):
            tags = self._run | {_SET: set_name(prefix) or UNNAMED_SET}
            for metric, gauge in self._evaluated.items():
                if prefix + metric in line:
                    gauge.set(_number(line[prefix + metric]), tags)
        committed = newest_commit(self._directory)
        if committed is not None:
            self._age.set(max(0.0, time.time() - committed), self._run)

    def _show_refused(self) -> None:
        """Set once: the data of a run does not change while it runs."""
        for data, counts in read_json(self._directory / DATA_REPORT).items():
            for reason, rows in counts.get("refused", {}).items():
                self._refused.set(rows, self._run | {_DATA: data, _REASON: reason})


def newest_commit(run_directory: Path) -> float | None:
    """When the newest checkpoint was committed, in seconds since 1970; None without any."""
    for directory in checkpoint_directories(run_directory):
        try:
            return (directory / MANIFEST).stat().st_mtime
        except FileNotFoundError:
            continue  # still being written, or just deleted
    return None


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
