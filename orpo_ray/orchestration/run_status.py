"""Where a run or a sweep stands, read from its directory alone: no Ray, no torch, no waiting."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orpo_ray.config.schema import ConfigError
from orpo_ray.orchestration.progress import eval_prefixes, set_name
from orpo_ray.orchestration.run_copy import refresh
from orpo_ray.orchestration.run_lock import last_driver
from orpo_ray.orchestration.run_state import Line, RunView, read_json
from orpo_ray.storage.bucket import address, is_copy
from orpo_ray.training.manifest import MANIFEST, checkpoint_directories, find_damage
from orpo_ray.training.run_files import (
    CONFIG,
    DATA_REPORT,
    EVALUATIONS,
    EVENTS,
    FINAL,
    METRICS,
    TRIAL_RECORD,
    TRIALS,
    count_events,
    read_lines,
)

_SHOWN = {
    "loss": "loss",
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "pairs_per_s": "pairs_per_s",
    "tokens_per_s": "tokens_per_s",
}
_EVALUATED = {
    "accuracy": "rewards/accuracies",
    "log_odds": "log_odds_chosen",
    "margin": "rewards/margins",
    "loss": "loss",
}


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands; ages are in seconds, None where there is nothing yet.

    Args:
        name: of the run.
        directory: absolute path.
        state: `not started`, `starting`, `training`, `finished`, `stopped`, `failed` (a trial), or
            `not heard of`: its driver was on another machine, and it wrote nothing for long.
        driver: process and machine of the last driver.
        quiet_s: since anything was written, where that is longer than is usual for a live run.
        logged_s: age of the last logged line.
        step: of the last logged line.
        n_steps: of the whole run.
        epoch: of the last logged line.
        left_s: until the end by the logged pace, while it trains.
        training: figures of the last logged step.
        evaluations: figures of the last evaluation of every set; `[value, low, high]` where the
            95 % interval is known, else `[value]`.
        checkpoint: step, age and folder of the newest one whose manifest and sizes are right.
        passed_over: newer folders of checkpoints than that, and what is wrong with them.
        data: rows read and refused by reason, for each data set.
        events: what the run met on its way, by kind.
        last_event: its text and age.
        model: folder and step of the exported model.
        values: the settings of a trial.
        failure: why a trial failed.
    """

    name: str
    directory: str
    state: str
    driver: str | None = None
    quiet_s: float | None = None
    logged_s: float | None = None
    step: int | None = None
    n_steps: int | None = None
    epoch: float | None = None
    left_s: float | None = None
    training: Line = field(default_factory=dict)
    evaluations: Sequence[Line] = ()
    checkpoint: Line | None = None
    passed_over: Sequence[Line] = ()
    data: Line = field(default_factory=dict)
    events: Mapping[str, int] = field(default_factory=dict)
    last_event: Line | None = None
    model: Line | None = None
    values: Line = field(default_factory=dict)
    failure: str | None = None


@dataclass(frozen=True)
class SweepStatus:
    """Where a sweep stands.

    Args:
        name: of the sweep.
        directory: absolute path.
        driver: process and machine of its last driver.
        is_alive: whether that driver still has it; None where this machine cannot tell.
        trials: by name.
    """

    name: str
    directory: str
    driver: str | None
    is_alive: bool | None
    trials: Sequence[RunStatus]


def read_status(directory: Path) -> RunStatus | SweepStatus:
    """Where the run or the sweep of a directory stands.

    Raises:
        ConfigError: when it is neither.
    """
    if is_copy(directory):
        refresh(directory)
    if not directory.is_dir():
        raise ConfigError([f"{address(directory)}: no such folder"])
    directory = directory.resolve()
    driver = last_driver(directory)
    if (directory / TRIALS).is_dir():
        folders = sorted(path.parent for path in (directory / TRIALS).glob(f"*/{TRIAL_RECORD}"))
        trials = [_status(RunView(folder, driver)) for folder in folders]
        alive = driver.is_alive if driver else None
        name = driver.name if driver else None
        return SweepStatus(directory.name, address(directory), name, alive, trials)
    marks = (CONFIG, METRICS, DATA_REPORT, TRIAL_RECORD)
    if driver is None and not any((directory / name).exists() for name in marks):
        missing = " nor ".join(marks)
        raise ConfigError([f"{address(directory)}: not a run directory: it has neither {missing}"])
    if (directory / TRIAL_RECORD).exists() and driver is None:
        driver = last_driver(directory.parent.parent)
    return _status(RunView(directory, driver))


def _status(run: RunView) -> RunStatus:
    state, last = run.state(), run.lines[-1] if run.lines else {}
    trained: Line = next((line for line in reversed(run.lines) if "loss" in line), {})
    checkpoint, passed_over = _checkpoints(run)
    report = read_json(run.directory / DATA_REPORT)
    model = None
    if run.exported is not None:
        model = {"step": run.exported, "folder": address(run.directory / FINAL)}
    return RunStatus(
        name=run.directory.name,
        directory=address(run.directory),
        state=state,
        driver=run.driver.name if run.driver else None,
        quiet_s=run.quiet_s() if state in ("training", "starting") else None,
        logged_s=run.age(last.get("time")),
        step=run.step,
        n_steps=run.n_steps,
        epoch=last.get("epoch"),
        left_s=run.left_s() if state == "training" else None,
        training={name: trained.get(key) for name, key in _SHOWN.items()} if trained else {},
        evaluations=_evaluations(run),
        checkpoint=checkpoint,
        passed_over=passed_over,
        data={
            name: {key: part[key] for key in ("rows_read", "refused") if key in part}
            for name, part in report.items()
        },
        events=count_events(run.directory),
        last_event=_last_event(run),
        model=model,
        values=run.record.get("values", {}),
        failure=run.record.get("failure"),
    )


def _evaluations(run: RunView) -> list[dict[str, Any]]:
    latest = {prefix: line for line in run.lines for prefix in eval_prefixes(line)}
    known = {(e["step"], e["set"]): e for e in read_lines(run.directory / EVALUATIONS)}
    found = []
    for prefix, line in latest.items():
        estimated = known.get((line["step"], prefix), {})
        figures = {name: [line.get(prefix + key)] for name, key in _EVALUATED.items()}
        # The margin and the loss of a metric are not those of an estimate: beta is in them.
        for name in ("accuracy", "log_odds"):
            interval = estimated.get("figures", {}).get(name, ())[1:]
            figures[name] += interval if None not in interval else ()
        about = {"set": set_name(prefix) or None, "step": line["step"]}
        found.append(about | {"pairs": estimated.get("pairs"), "figures": figures})
    return found


def _checkpoints(run: RunView) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The newest checkpoint that is whole by its manifest and sizes, and newer ones."""
    passed_over: list[dict[str, Any]] = []
    for directory in checkpoint_directories(run.directory):
        step = int(directory.name.removeprefix("step-"))
        try:
            damage = find_damage(directory, read_files=False)
            committed = (directory / MANIFEST).stat().st_mtime if damage is None else None
        except FileNotFoundError:
            continue  # it was deleted just now
        if damage is None:
            about = {"step": step, "age_s": run.age(committed), "folder": address(directory)}
            return about | {"checked": "manifest and sizes"}, passed_over
        if not (directory / MANIFEST).exists():
            damage = f"it has no {MANIFEST}: it is being written, or its save was cut off"
        passed_over.append({"step": step, "reason": damage})
    return None, passed_over


def _last_event(run: RunView) -> dict[str, Any] | None:
    path = run.directory / EVENTS
    for text in reversed(path.read_text().splitlines() if path.exists() else []):
        try:
            event = json.loads(text)
            return {"text": event["text"], "age_s": run.age(event["time"])}
        except (ValueError, KeyError, TypeError):
            continue  # torn
    return None
