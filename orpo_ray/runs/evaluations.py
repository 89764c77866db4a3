"""The evaluations of a run, from `metrics.jsonl`, with the intervals of `evaluations.jsonl`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo_ray.runs.files import EVALUATIONS
from orpo_ray.runs.metrics import Metric, eval_prefixes
from orpo_ray.storage.files import read_lines


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of one set.

    Args:
        prefix: of the set.
        step: optimizer steps done before it.
        pairs: of the set; None where `evaluations.jsonl` lacks the evaluation.
        line: its line of `metrics.jsonl`.
        estimates: `[value, low, high]` by the short name of a metric, with 95 % intervals.
    """

    prefix: str
    step: int
    pairs: int | None
    line: Mapping[str, Any]
    estimates: Mapping[str, Sequence[float | None]]

    def value(self, metric: Metric) -> list[float | None]:
        """`[value, low, high]` of a metric where its interval is known, else `[value]`."""
        value = [self.line.get(self.prefix + metric.name)]
        # The loss of an estimate is not the metric's: that depends on beta.
        interval = self.estimates.get(metric.key, ())[1:] if metric.has_interval else ()
        return value if None in (*value, *interval) else [*value, *interval]


def read_evaluations(
    run_directory: Path, lines: Sequence[Mapping[str, Any]], last_step: int | None = None
) -> list[Evaluation]:
    """The evaluations of a run in the order of steps.

    Args:
        run_directory: of the run.
        lines: of its `metrics.jsonl`.
        last_step: no later ones; None for all.
    """
    known = {(e["step"], e["set"]): e for e in read_lines(run_directory / EVALUATIONS)}
    found = []
    for line in lines:
        step = line["step"]
        if last_step is not None and step > last_step:
            continue
        for prefix in eval_prefixes(line):
            estimated = known.get((step, prefix), {})
            estimates = estimated.get("figures", {})
            found.append(Evaluation(prefix, step, estimated.get("pairs"), line, estimates))
    return found


def latest(evaluations: Sequence[Evaluation]) -> dict[str, Evaluation]:
    """The last evaluation of every set, by prefix."""
    return {evaluation.prefix: evaluation for evaluation in evaluations}
