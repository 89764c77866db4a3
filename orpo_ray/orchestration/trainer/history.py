"""Lines of `metrics.jsonl` as transformers' `log_history` and `TrainerState`; on the driver."""

import math
from collections.abc import Mapping
from typing import Any

from transformers import TrainerState

from orpo_ray.config.schema import ORPOConfig

_PREFIX = "eval_"
Entry = dict[str, Any]


def entries(line: Mapping[str, Any]) -> list[Entry]:
    """What transformers logs of a line: training and evaluations apart, each with its step."""
    place = {"epoch": line["epoch"], "step": line["step"]}
    rest = {name: value for name, value in line.items() if name not in (*place, "time")}
    evaluated = {name: value for name, value in rest.items() if name.startswith(_PREFIX)}
    trained = {name: value for name, value in rest.items() if name not in evaluated}
    parts = [trained if "loss" in line else {}, evaluated]
    return [part | place for part in parts if part]


def is_evaluation(entry: Entry) -> bool:
    """Whether an entry is of an evaluation."""
    return any(name.startswith(_PREFIX) for name in entry)


def add_entry(state: TrainerState, entry: Entry, config: ORPOConfig) -> None:
    """Add an entry to the history, and note its step and whether it is the best evaluation."""
    state.log_history.append(entry)
    state.global_step, state.epoch = int(entry["step"]), entry["epoch"]
    train = config.train
    name = _PREFIX + train.metric_for_best_model.removeprefix(_PREFIX)
    value = entry.get(name)
    if value is None or not math.isfinite(value) or not state.global_step:
        return
    greater = train.greater_is_better
    if greater is None:
        greater = not name.endswith("loss")
    best = state.best_metric
    if best is None or (value > best if greater else value < best):
        state.best_metric, state.best_global_step = value, state.global_step
