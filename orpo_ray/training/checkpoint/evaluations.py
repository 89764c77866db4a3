"""The history of the evaluation by which the best model is chosen; in workers.

The driver asks it for the metrics that there are before torch is imported.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orpo_ray.config.train import TrainSection
from orpo_ray.runs.formatting import format_metric
from orpo_ray.runs.metrics import EVALUATED
from orpo_ray.training.errors import EvaluationError

_PREFIX = "eval_"


@dataclass
class Evaluations:
    """The values of `metric_for_best_model` so far; the same on every rank.

    They are not stored in checkpoints but read from `metrics.jsonl`, which is on disk before a
    checkpoint is and is truncated to its step. So a run may resume with another metric or patience.

    As in transformers, the evaluation before the first step is not a candidate, an equal value is
    not an improvement, and neither is one that is not finite.

    Args:
        metric: its name in `metrics.jsonl`; None if neither option needs one.
        greater_is_better: whether a higher value is better.
        patience: consecutive evaluations without improvement before stopping; None: no limit.
        keep_best: whether the checkpoint of the best evaluation is saved, kept and exported.
        values: (step, value) in ascending order of steps.
    """

    metric: str | None
    greater_is_better: bool = False
    patience: int | None = None
    keep_best: bool = False
    values: list[tuple[int, float]] = field(default_factory=list)

    @staticmethod
    def from_config(config: TrainSection, prefixes: Sequence[str]) -> "Evaluations":
        """An empty history for a run with this config.

        Args:
            config: with the metric, its direction and its uses.
            prefixes: of the evaluation sets in `metrics.jsonl`.

        Raises:
            EvaluationError: when there is no evaluation set, or none has the metric.
        """
        patience, keep_best = config.early_stopping_patience, config.load_best_model_at_end
        if patience is None and not keep_best:
            return Evaluations(None)
        if not prefixes:
            name = "load_best_model_at_end" if keep_best else "early_stopping_patience"
            raise EvaluationError(
                f"{name}: this run has no evaluation data; set eval_files or val_set_size"
            )
        key = _PREFIX + config.metric_for_best_model.removeprefix(_PREFIX)
        # The router loss is among them; evaluations show whether the model has one.
        known = {prefix + metric.name: metric for prefix in prefixes for metric in EVALUATED}
        _refuse_unknown(key, list(known))
        greater = config.greater_is_better
        if greater is None:
            greater = not known[key].lower_is_better
        return Evaluations(key, greater, patience, keep_best)

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Add an evaluation; a collective, so that all ranks stop at the same step.

        Raises:
            EvaluationError: when it does not have the metric.
        """
        if self.metric is None:
            return
        _refuse_unknown(self.metric, list(metrics))
        self.values.append((step, _of_rank_0(metrics[self.metric])))

    def restore(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Restore the history from the lines of `metrics.jsonl` that rank 0 has read."""
        if self.metric is None:
            return
        found = [(line["step"], line[self.metric]) for line in lines if self.metric in line]
        # Values that are not finite are null in JSON.
        known = ((step, math.nan if value is None else value) for step, value in _of_rank_0(found))
        self.values = list(known)

    @property
    def ranking(self) -> tuple[int, ...]:
        """Steps from the best to the worst evaluation; ties by ascending step."""
        sign = -1.0 if self.greater_is_better else 1.0
        ranked = [(sign * value, step) for step, value in self.values if math.isfinite(value)]
        return tuple(step for _, step in sorted(ranked) if step)

    @property
    def best_step(self) -> int | None:
        """Step of the best evaluation, or None."""
        return next(iter(self.ranking), None)

    @property
    def n_without_better(self) -> int:
        """Number of evaluations since the best one."""
        best = self.best_step or 0
        return sum(step > best for step, _ in self.values)

    @property
    def patience_is_out(self) -> bool:
        """Whether to stop early."""
        return self.patience is not None and self.n_without_better >= self.patience

    def stop_text(self, step: int) -> str:
        """Log line with the reason for early stopping."""
        rule = f"early_stopping_patience={self.patience}"
        if self.best_step is None:
            return f"stopped early at step {step}: {self.metric} was never finite ({rule})"
        return (
            f"stopped early at step {step}: {self.n_without_better} evaluations in a row were no "
            f"better than {self._value_text(self.best_step)} ({rule})"
        )

    def export_text(self, step: int) -> str:
        """Log line with the exported step, for `load_best_model_at_end`."""
        text = f"final/ is the model of step {step}"
        if step != self.best_step:
            return text
        n_candidates = sum(other > 0 for other, _ in self.values)
        text += f", the best of {n_candidates} evaluations: {self._value_text(step)}"
        start, best = dict(self.values).get(0, math.nan), dict(self.values)[step]
        if start > best if self.greater_is_better else start < best:
            text += f"; before training it was better: {format_metric(start, '.6g')}"
        return text

    def _value_text(self, step: int) -> str:
        return f"{self.metric} {format_metric(dict(self.values)[step], '.6g')} at step {step}"


def _of_rank_0(value: Any) -> Any:
    """The value that rank 0 has; a collective."""
    import torch.distributed as dist

    found = [value]
    dist.broadcast_object_list(found)
    return found[0]


def _refuse_unknown(metric: str, known: Sequence[str]) -> None:
    """Refuse a metric that no evaluation has.

    Raises:
        EvaluationError: listing the known metrics.
    """
    if metric not in known:
        raise EvaluationError(
            f"metric_for_best_model: the evaluations have no {metric}; known are {', '.join(known)}"
        )
