"""What came of a run, on a few lines with their uncertainty; on the driver."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orpo_ray.runs.evaluations import Evaluation, latest, read_evaluations
from orpo_ray.runs.files import FINAL, MARGINS, exported_step, read_metrics
from orpo_ray.runs.formatting import format_metric
from orpo_ray.runs.metrics import BY_NAME, Metric, set_name
from orpo_ray.runs.suspects import SUSPECTS, too_early_to_tell

_TRAINED = ("loss", "rewards/accuracies", "log_odds_chosen")
_HELD_OUT = {"rewards/accuracies": ".3f", "log_odds_chosen": "+.3f"}
_LAST_PART = 4  # of the steps, one in so many


def outcome_lines(run_directory: Path) -> list[str]:
    """Training's means over the last part of a run, and held-out metrics before and after it."""
    lines = read_metrics(run_directory)
    evaluations = read_evaluations(run_directory, lines, exported_step(run_directory / FINAL))
    before = latest([evaluation for evaluation in evaluations if evaluation.step == 0])
    found = [*_training_lines(lines)]
    has_intervals = False
    for prefix, after in latest(evaluations).items():
        name = f" ({set_name(prefix)})" if set_name(prefix) else ""
        for metric, form in ((BY_NAME[name], form) for name, form in _HELD_OUT.items()):
            texts = [f"{estimate_text(after, metric, form)} after"] if after.step else []
            if prefix in before:
                texts.insert(0, f"{estimate_text(before[prefix], metric, form)} before")
            found.append(f"held-out {metric.label}{name}: {', '.join(texts)}")
            has_intervals |= len(after.value(metric)) > 1
    if has_intervals:
        found.append("in brackets: 95 % confidence intervals, by bootstrap over prompts")
    return found


def estimate_text(evaluation: Evaluation, metric: Metric, form: str) -> str:
    """A metric of an evaluation, with its interval in brackets where it is known."""
    value, *interval = (format_metric(part, form) for part in evaluation.value(metric))
    return f"{value} ({' to '.join(interval)})" if interval else value


def label_noise_line(run_directory: Path) -> str:
    """Where rows are that look labelled the wrong way round, or why none can be named yet."""
    if not (run_directory / MARGINS).exists():
        return "labels: none can be called wrong, as no rejected answer was computed"
    reason = too_early_to_tell(run_directory)
    if reason is None:
        return f"rows that look labelled the wrong way round come first in {SUSPECTS}"
    return f"labels: too early to tell which are wrong: {reason}"


def _training_lines(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The means over the last quarter of the steps: a single line may be of a single batch."""
    trained = [line for line in lines if "loss" in line]
    if not trained:
        return []
    n_steps = trained[-1]["step"]
    starts = [0, *(line["step"] for line in trained[:-1])]
    weights = [line["step"] - start for start, line in zip(starts, trained, strict=True)]
    last = [
        (line, weight)
        for line, start, weight in zip(trained, starts, weights, strict=True)
        if start >= n_steps - max(1, n_steps // _LAST_PART)
    ] or [(trained[-1], weights[-1])]
    texts = []
    for metric in (BY_NAME[name] for name in _TRAINED):
        if not any(metric.name in line for line, _ in last):
            continue  # of two answers, where rejected ones are not computed
        known = [(line[metric.name], n) for line, n in last if line.get(metric.name) is not None]
        total = sum(n for _, n in known)
        mean = sum(value * n for value, n in known) / total if total else None
        texts.append(metric.text(mean))
    n_last = sum(weight for _, weight in last)
    of = f"mean of the last {n_last} steps" if n_last > 1 else "the last batch alone"
    return [f"training: {'  '.join(texts)} at step {n_steps} ({of})"]
