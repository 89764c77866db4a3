"""The trials of a sweep and how they rank, read from their folders alone; on the driver."""

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from orpo_ray.config.schema import ConfigError, ORPOConfig
from orpo_ray.runs.files import FINAL, TRIAL_RECORD, TRIALS, read_metrics
from orpo_ray.runs.metrics import EVALUATED, split_eval_key
from orpo_ray.storage.files import read_json


@dataclass(frozen=True)
class Trial:
    """One trial, from the files in its folder.

    Args:
        name: of the trial and of its folder.
        directory: its run directory.
        values: of the settings that were searched.
        failure: the reason, if it failed.
        lines: its logged steps and evaluations.
        stopped_early: whether the sweep's scheduler ended it.
    """

    name: str
    directory: Path
    values: Mapping[str, Any]
    failure: str | None
    lines: Sequence[Mapping[str, Any]]
    stopped_early: bool = False

    @property
    def objective(self) -> str:
        """What it minimised."""
        return str(self.values.get("objective", "orpo"))

    @property
    def finished(self) -> bool:
        """Whether it was trained to the end and its model exported."""
        return (self.directory / FINAL).is_dir()

    @property
    def status(self) -> str:
        """One word or two for the table; `unfinished` is what runs, or was cut with the sweep."""
        if self.finished:
            return "finished"
        if self.failure:
            return "failed"
        return "stopped early" if self.stopped_early else "unfinished"

    def evaluations(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of every evaluation that has the metric."""
        found = [(line["step"], line.get(metric)) for line in self.lines]
        return [(step, float(value)) for step, value in found if value is not None]

    def last(self, metric: str) -> float:
        """The metric at the last evaluation; not a number where there was none."""
        values = self.evaluations(metric)
        return values[-1][1] if values else math.nan


@dataclass(frozen=True)
class Goal:
    """How trials are compared.

    Args:
        metric: its key in `metrics.jsonl`.
        prefix: of the evaluation set in it.
        mode: `max` or `min`.
        max_nll_increase: over the evaluation before training, in nats; None for no limit.
        repeats: seeds per setting.
    """

    metric: str
    prefix: str
    mode: str
    max_nll_increase: float | None
    repeats: int = 1

    @staticmethod
    def from_config(config: ORPOConfig) -> "Goal":
        """The goal that a config sets.

        Raises:
            ConfigError: when `tune.metric` is not a metric of an evaluation.
        """
        tune = config.tune
        found = split_eval_key(tune.metric)
        if found is None:
            raise ConfigError(goal_problems(config))
        prefix, metric = found
        mode = tune.metric_mode or ("min" if metric.lower_is_better else "max")
        return Goal(tune.metric, prefix, mode, tune.max_nll_increase, tune.repeats)

    def nll_increase(self, trial: Trial) -> float:
        """NLL at the last evaluation less that at the first, in nats."""
        values = trial.evaluations(f"{self.prefix}nll_loss")
        return values[-1][1] - values[0][1] if values else math.nan

    def guarded(self, trial: Trial) -> bool:
        """Whether the guard on the NLL rules the trial out."""
        limit = self.max_nll_increase
        return limit is not None and self.nll_increase(trial) > limit

    def repeated(self, trial: Trial, trials: Sequence[Trial]) -> list[Trial]:
        """The runs of a trial's setting, which differ in their seed only; itself alone without."""
        if self.repeats == 1:
            return [trial]
        return [other for other in trials if _without_seed(other) == _without_seed(trial)]

    def mean(self, trial: Trial, trials: Sequence[Trial]) -> float:
        """The metric's mean over the runs of a trial's setting."""
        return fmean(other.last(self.metric) for other in self.repeated(trial, trials))

    def spread(self, trial: Trial, trials: Sequence[Trial]) -> float:
        """Its standard deviation over them."""
        return pstdev(other.last(self.metric) for other in self.repeated(trial, trials))

    def eligible(self, trial: Trial, trials: Sequence[Trial]) -> bool:
        """Whether every run of a trial's setting is finished and passes the guard."""
        runs = self.repeated(trial, trials)
        return all(run.finished and not self.guarded(run) for run in runs)

    def ranked(self, trials: Sequence[Trial]) -> list[Trial]:
        """Settings that can be chosen, the best mean first; then all others, likewise."""
        sign = -1 if self.mode == "max" else 1

        def key(trial: Trial) -> tuple[bool, bool, bool, float, float, str]:
            values = [self.mean(trial, trials), trial.last(self.metric)]
            mean, own = (math.inf if math.isnan(v) else sign * v for v in values)
            chosen = self.eligible(trial, trials)
            return (not chosen, not trial.finished, self.guarded(trial), mean, own, trial.name)

        return sorted(trials, key=key)

    def best(self, trials: Sequence[Trial]) -> Trial | None:
        """The best run of the best setting that can be chosen, if there is one."""
        ranked = self.ranked(trials)
        return ranked[0] if ranked and self.eligible(ranked[0], trials) else None


def goal_problems(config: ORPOConfig, searched: Container[str] = ()) -> list[str]:
    """What is wrong with `tune.metric` for a sweep of these settings, if anything is."""
    metric = config.tune.metric
    found = split_eval_key(metric)
    if found:
        if "objective" in searched and found[1].name in _OWN_SCALES:
            better = found[0] + "rewards/accuracies"
            return [f"tune.metric: {metric} is of another scale for each objective; use {better}"]
        return []
    known = ", ".join(f"eval_{metric.name}" for metric in EVALUATED)
    return [f"tune.metric: {metric} is not an evaluation's metric; known are {known}"]


# Metrics that do not mean the same for every objective.
_OWN_SCALES = ("loss", "rewards/margins", "rewards/chosen", "rewards/rejected")


def _without_seed(trial: Trial) -> dict[str, Any]:
    return {name: value for name, value in trial.values.items() if name != "seed"}


def read_trials(
    sweep_directory: Path, lines_of: Callable[[Path], list[dict[str, Any]]] = read_metrics
) -> list[Trial]:
    """All trials of a sweep that were begun, by name; `lines_of` reads the metrics of one."""
    trials = []
    for path in sorted((sweep_directory / TRIALS).glob(f"*/{TRIAL_RECORD}")):
        record = read_json(path)
        lines = lines_of(path.parent)
        trials.append(
            Trial(
                record["trial"],
                path.parent,
                record["values"],
                record.get("failure"),
                lines,
                bool(record.get("stopped_early")),
            )
        )
    return trials


def table_rows(trials: Sequence[Trial], goal: Goal) -> list[dict[str, Any]]:
    """A row a trial, in the order of `trials`: values, last evaluation, status."""
    losses = [metric.name for metric in EVALUATED if metric.lower_is_better]
    others = sorted(metric.name for metric in EVALUATED if not metric.lower_is_better)
    names = [goal.prefix + name for name in (*losses, *others)]
    rows = []
    for trial in trials:
        row: dict[str, Any] = {"trial": trial.name} | dict(trial.values)
        row |= {name: trial.last(name) for name in names if trial.evaluations(name)}
        if goal.repeats > 1:
            row |= {"mean": goal.mean(trial, trials), "spread": goal.spread(trial, trials)}
        row["nll_increase"] = goal.nll_increase(trial)
        row["steps"] = max((line["step"] for line in trial.lines), default=0)
        row["status"] = "ruled out: NLL" if goal.guarded(trial) else trial.status
        row["failure"] = trial.failure
        rows.append(row)
    return rows
