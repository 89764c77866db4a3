"""A run's figures for Prometheus, through Ray's own metrics; on rank 0.

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
from orpo_ray.runs.metrics import eval_prefixes, set_name
from orpo_ray.storage.files import read_json

# Gauges of logged steps by the metric that they show, and their meaning.
TRAINED = {
    "step": ("orpo_step", "Optimizer steps done, as last logged."),
    "pairs_per_s": ("orpo_pairs_per_s", "Preference pairs trained a second, over all workers."),
    "tokens_per_s": ("orpo_tokens_per_s", "Tokens computed a second, over all workers."),
    "mfu": ("orpo_mfu", "Share of a timed matrix product's rate that useful tokens reach."),
    "loss": ("orpo_loss", "Training loss, in nats."),
    "nll_loss": ("orpo_nll_loss", "NLL of the training loss, in nats a token."),
    "rewards/margins": ("orpo_reward_margin", "Mean reward margin of the trained pairs."),
    "rewards/accuracies": ("orpo_reward_accuracy", "Share of trained pairs in the right order."),
}
# The same of evaluations, by the metric behind the prefix of the set.
EVALUATED = {
    "loss": ("orpo_eval_loss", "Loss on held-out pairs, in nats."),
    "nll_loss": ("orpo_eval_nll_loss", "NLL on held-out pairs, in nats a token."),
    "rewards/margins": ("orpo_eval_reward_margin", "Mean reward margin on held-out pairs."),
    "rewards/accuracies": (
        "orpo_eval_reward_accuracy",
        "Share of held-out pairs in the right order.",
    ),
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
        """Take up a line of `metrics.jsonl`.

        A figure that is not finite becomes NaN, with which Ray serves the gauge no more: a gap,
        where the last finite figure would be untrue.
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
        """Set once: the data of a run does not change while it goes on."""
        for data, figures in read_json(self._directory / DATA_REPORT).items():
            for reason, rows in figures.get("refused", {}).items():
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
