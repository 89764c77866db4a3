"""The names of a run's metrics: which evaluation sets they are of, and how a number is shown."""

from collections.abc import Mapping
from typing import Any


def eval_prefixes(figures: Mapping[str, Any]) -> list[str]:
    """The prefixes of the evaluation sets whose figures these are: `eval_`, `eval_<name>_`."""
    last = "rewards/accuracies"
    return [n.removesuffix(last) for n in figures if n.startswith("eval_") and n.endswith(last)]


def set_name(prefix: str) -> str:
    """The name of an evaluation set in its metrics' prefix; empty where it has none."""
    return prefix.removeprefix("eval_").removesuffix("_")


def figure(value: float | None, form: str = ".4f") -> str:
    """A figure of the metrics, which has none where it was not finite."""
    return "not finite" if value is None else format(value, form)
