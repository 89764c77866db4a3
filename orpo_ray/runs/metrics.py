"""The catalogue of metrics: every key of `metrics.jsonl`, and how it is shown.

A new metric is one entry of `METRICS`: charts, gauges, the table of a sweep and the choice of the
best model are made from it. What a metric is computed from is in `objective/metrics.py` and
`training/metrics.py`. Keys of evaluations have a prefix, `eval_` or `eval_<name>_`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from orpo_ray.runs.files import TIME_PARTS, TIME_PREFIX
from orpo_ray.runs.formatting import format_metric


@dataclass(frozen=True)
class Metric:
    """A key of `metrics.jsonl`.

    Args:
        name: the key; in evaluations it follows the prefix of the set.
        title: what it is, in charts and for Prometheus.
        unit: empty for a ratio.
        short: key in the JSON of `status` and, with blanks, the label in tables and on terminals;
            `name` by default.
        form: format of a number.
        is_evaluated: whether evaluations have it too.
        lower_is_better: the direction of optimization where a config does not set it.
        has_interval: whether `evaluations.jsonl` has its confidence interval, as `short`.
        chart: the group of charts that show it; metrics of one title share a chart.
        baseline: its value when nothing was learned, drawn as a line.
        gauge: name for Prometheus, without the prefix `orpo_` or `orpo_eval_`.
    """

    name: str
    title: str
    unit: str = ""
    short: str = ""
    form: str = ".4f"
    is_evaluated: bool = False
    lower_is_better: bool = False
    has_interval: bool = False
    chart: Literal["learning", "throughput"] | None = None
    baseline: float | None = None
    gauge: str | None = None

    @property
    def key(self) -> str:
        """`short`, or the name where there is none."""
        return self.short or self.name

    @property
    def label(self) -> str:
        """Name in tables and on terminals."""
        return self.key.replace("_", " ")

    @property
    def heading(self) -> str:
        """Title with the unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    def help(self, evaluated: bool) -> str:
        """Description of the gauge of training, or of that of evaluations."""
        title = self.title[0].upper() + self.title[1:]
        pairs = " on held-out pairs" if evaluated else ""
        return f"{title}{pairs}{f', in {self.unit}' if self.unit else ''}."

    def text(self, value: float | None) -> str:
        """A value with its label, or with its unit where that says what it is."""
        number = format_metric(value, self.form)
        is_rate = self.unit.endswith("/s")
        return f"{number} {self.unit}" if is_rate else f"{self.label} {number}"


def _evaluated(name: str, title: str, unit: str = "", **more: Any) -> Metric:
    return Metric(name, title, unit, is_evaluated=True, **more)


METRICS = (
    _evaluated("loss", "loss", "nats", lower_is_better=True, chart="learning", gauge="loss"),
    _evaluated(
        "nll_loss",
        "NLL",
        "nats/token",
        short="NLL",
        lower_is_better=True,
        chart="learning",
        gauge="nll_loss",
    ),
    _evaluated(
        "log_odds_chosen",
        "log odds of chosen over rejected",
        short="log_odds",
        has_interval=True,
        chart="learning",
        baseline=0.0,
        gauge="log_odds",
    ),
    _evaluated("log_odds_ratio", "mean logsigmoid of the log odds"),
    _evaluated(
        "rewards/accuracies",
        "reward accuracy",
        short="accuracy",
        form=".3f",
        has_interval=True,
        chart="learning",
        baseline=0.5,
        gauge="reward_accuracy",
    ),
    _evaluated("rewards/margins", "reward margin"),
    _evaluated("rewards/chosen", "reward of chosen answers"),
    _evaluated("rewards/rejected", "reward of rejected answers"),
    _evaluated("logps/chosen", "log-probability per token", "nats", chart="learning"),
    _evaluated("logps/rejected", "log-probability per token", "nats", chart="learning"),
    _evaluated("aux_loss", "router loss", lower_is_better=True, chart="learning"),
    Metric("learning_rate", "learning rate", form=".2e", chart="learning"),
    Metric("grad_norm", "gradient norm before clipping", chart="learning"),
    Metric(
        "pairs_per_s",
        "throughput",
        "pairs/s",
        form=".1f",
        chart="throughput",
        gauge="pairs_per_s",
    ),
    Metric(
        "tokens_per_s",
        "throughput",
        "tokens/s",
        form=".0f",
        chart="throughput",
        gauge="tokens_per_s",
    ),
    Metric(
        "mfu",
        "MFU, relative to a timed matrix product",
        chart="throughput",
        gauge="mfu",
    ),
    Metric("step", "optimizer steps done", gauge="step"),
    Metric("epoch", "epochs done"),
    Metric("time", "time of logging", "s since 1970"),
    *(Metric(TIME_PREFIX + part, f"time in {part.replace('_', ' ')}", "s") for part in TIME_PARTS),
)
BY_NAME = {metric.name: metric for metric in METRICS}
BY_KEY = {metric.key: metric for metric in METRICS}
EVALUATED = tuple(metric for metric in METRICS if metric.is_evaluated)


def _select(*names: str) -> tuple[Metric, ...]:
    return tuple(BY_NAME[name] for name in names)


# On terminals: of the last logged step, and of the last evaluation. How far answers are apart is
# told by the log odds everywhere: rewards are multiplied by beta, and all zero without it.
TRAINING_SUMMARY = _select(
    "loss",
    "rewards/accuracies",
    "log_odds_chosen",
    "learning_rate",
    "pairs_per_s",
    "tokens_per_s",
)
EVALUATION_SUMMARY = _select("rewards/accuracies", "log_odds_chosen", "loss")
# By which models are compared: before and after training, and across the trials of a sweep.
HEADLINE = _select("rewards/accuracies", "log_odds_chosen", "nll_loss")


def split_eval_key(key: str) -> tuple[str, Metric] | None:
    """Prefix and metric of a key of evaluations; None for any other key."""
    for metric in sorted(EVALUATED, key=lambda metric: -len(metric.name)):
        prefix = key.removesuffix(metric.name)
        if prefix != key and prefix.startswith("eval_") and prefix.endswith("_"):
            return prefix, metric
    return None


def eval_prefixes(line: Mapping[str, Any]) -> list[str]:
    """The prefixes of the evaluation sets in a line: `eval_`, `eval_<name>_`."""
    last = "rewards/accuracies"
    return [n.removesuffix(last) for n in line if n.startswith("eval_") and n.endswith(last)]


def set_name(prefix: str) -> str:
    """The name of an evaluation set in its metrics' prefix; empty where it has none."""
    return prefix.removeprefix("eval_").removesuffix("_")
