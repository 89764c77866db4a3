"""The status of a run or a sweep, read from its directory alone: no Ray, no torch, no waiting."""

import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orpo_ray.config.file import FORMAT_NAME
from orpo_ray.config.schema import ConfigError, ORPOConfig
from orpo_ray.runs.evaluations import latest, read_evaluations
from orpo_ray.runs.files import (
    CONFIG,
    DATA_REPORT,
    FINAL,
    LEDGER,
    LOG,
    METRICS,
    TIME_PARTS,
    TIME_PREFIX,
    TRIAL_RECORD,
    TRIALS,
    count_events,
    exported_step,
    read_events,
    read_metrics,
)
from orpo_ray.runs.lock import Driver, last_driver
from orpo_ray.runs.manifest import MANIFEST, NewerCheckpointError, checkpoints, find_damage
from orpo_ray.runs.metrics import (
    EVALUATION_SUMMARY,
    TRAINING_SUMMARY,
    set_name,
)
from orpo_ray.runs.mirror import refresh
from orpo_ray.storage.files import read_json
from orpo_ray.storage.folder import Folder, FolderLike

Line = Mapping[str, Any]
# A run is quiet when it wrote nothing for this long, and for this many of its usual pauses.
_QUIET_S, _QUIET_PAUSES = 300.0, 10
# Logged lines from which the pace is estimated.
_RECENT = 50


class RunView:
    """A run directory as it is now.

    Args:
        folder: the run directory.
        driver: that claimed it last; of a trial, the driver of its sweep.
    """

    def __init__(self, folder: Folder, driver: Driver | None) -> None:
        directory = folder.path
        self.folder, self.directory, self.driver, self.now = folder, directory, driver, time.time()
        self.lines = read_metrics(directory)
        self.record = read_json(directory / TRIAL_RECORD)
        self.exported = exported_step(directory / FINAL)
        self.step: int | None = self.lines[-1]["step"] if self.lines else None
        self._config = _read_config(directory)
        self.n_steps = total_steps(self._config, self.lines) if self._config else None

    def state(self) -> str:
        """One of the states of `RunStatus`."""
        is_trial, alive = bool(self.record), self.driver.is_alive if self.driver else None
        if is_trial and alive:
            alive = None  # its sweep has a driver: that says nothing of this trial
        if self.record.get("failure"):
            return "failed"
        claimed_at = self.driver.since if self.driver and not is_trial else 0.0
        is_new = not self.lines or self.lines[-1]["time"] < claimed_at
        if alive:
            return "starting" if is_new else "training"
        if self._is_finished():
            return "finished"
        if alive is False:
            return "stopped"
        if not is_trial and self.driver is None and not self.lines:
            return "not started"
        if self.quiet_s() is None:
            return "starting" if is_new else "training"
        return "stopped" if is_trial else "unknown"

    def quiet_s(self) -> float | None:
        """Seconds since anything was written, if that is long for a live run."""
        names = (METRICS, LEDGER, LOG, CONFIG, TRIAL_RECORD)
        times = [p.stat().st_mtime for p in (self.directory / n for n in names) if p.exists()]
        if self.driver is not None and not self.record:
            times.append(self.driver.since)
        quiet_s = self.now - max(times, default=0.0)
        recent = itertools.pairwise(self.lines[-_RECENT:])
        pauses = [later["time"] - line["time"] for line, later in recent]
        usual = statistics.median(pauses) if pauses else 0.0
        return quiet_s if quiet_s > max(_QUIET_S, _QUIET_PAUSES * usual) else None

    def left_s(self) -> float | None:
        """Estimated from the workers' time in the last lines; time without workers is left out."""
        recent = self.lines[-_RECENT:]
        n_steps = recent[-1]["step"] - recent[0]["step"]
        if self.n_steps is None or not n_steps:
            return None
        spent = sum(line.get(TIME_PREFIX + part, 0.0) for line in recent[1:] for part in TIME_PARTS)
        left = spent / n_steps * (self.n_steps - recent[-1]["step"])
        return float(max(0.0, left - (self.now - recent[-1]["time"])))

    def age(self, then: float | None) -> float | None:
        """Seconds since then."""
        return None if then is None else max(0.0, self.now - then)

    def _is_finished(self) -> bool:
        """Whether the model is exported, and not one of an earlier, shorter run."""
        if self.exported is None or self.step is None or self.n_steps is None:
            return self.exported is not None
        if self.step >= self.n_steps:
            return True
        patience = self._config.train.early_stopping_patience if self._config else None
        written = max(path.stat().st_mtime for path in (self.directory / FINAL).iterdir())
        return patience is not None and written >= self.lines[-1]["time"]


def total_steps(config: ORPOConfig, lines: Sequence[Line]) -> int | None:
    """Optimizer steps of the whole run; None before the first step where `max_steps` is unset."""
    per_epoch = [round(line["step"] / line["epoch"]) for line in lines if line["step"]]
    if per_epoch:
        return config.total_steps(per_epoch[-1])
    return config.train.max_steps if config.train.max_steps > 0 else None


def _read_config(directory: Path) -> ORPOConfig | None:
    """The config of a run; None where it has none, or one of another version."""
    import yaml

    try:
        values = yaml.safe_load((directory / CONFIG).read_text(encoding="utf-8"))
        values.pop(FORMAT_NAME, None)
        return ORPOConfig.model_validate(values)
    except (AttributeError, OSError, ValueError, yaml.YAMLError):
        return None


# Counts of `data_report.json` that the status repeats.
_DATA_COUNTS = ("rows_read", "rows_kept", "rows_held_out", "rows_refused", "refused")


@dataclass(frozen=True)
class RunStatus:
    """The status of a run; ages are in seconds, None where there is nothing yet.

    Args:
        name: of the run.
        directory: absolute path.
        state: `not started`, `starting`, `training`, `finished`, `stopped`, `failed` (a trial), or
            `unknown`: its driver was on another machine, and nothing was written for long.
        driver: process and machine of the last driver.
        quiet_s: since anything was written, where that is longer than is usual for a live run.
        logged_s: age of the last logged line.
        step: of the last logged line.
        n_steps: of the whole run.
        epoch: of the last logged line.
        left_s: until the end by the logged pace, while it trains.
        training: metrics of the last logged step.
        evaluations: metrics of the last evaluation of every set; `[value, low, high]` where the
            95 % interval is known, else `[value]`.
        checkpoint: step, age and folder of the newest one with a correct manifest and file sizes.
        passed_over: newer folders of checkpoints than that, and the reason why each is unusable.
        data: rows read, kept, held out, and refused by reason, for each data set.
        events: number of events by kind.
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
    """The status of a sweep.

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


def read_status(place: FolderLike) -> RunStatus | SweepStatus:
    """The status of the run or the sweep in a directory.

    Raises:
        ConfigError: when it is neither.
    """
    folder = Folder.at(place)
    if folder.url is not None:
        refresh(folder)
    directory = folder.path
    if not directory.is_dir():
        raise ConfigError([f"{folder.address}: no such folder"])
    driver = last_driver(folder)
    if (directory / TRIALS).is_dir():
        records = sorted((directory / TRIALS).glob(f"*/{TRIAL_RECORD}"))
        folders = [folder / TRIALS / record.parent.name for record in records]
        trials = [_status(RunView(trial, driver)) for trial in folders]
        alive = driver.is_alive if driver else None
        name = driver.name if driver else None
        return SweepStatus(folder.name, folder.address, name, alive, trials)
    marks = (CONFIG, METRICS, DATA_REPORT, TRIAL_RECORD)
    if driver is None and not any((directory / name).exists() for name in marks):
        missing = " nor ".join(marks)
        raise ConfigError([f"{folder.address}: not a run directory: it has neither {missing}"])
    if (directory / TRIAL_RECORD).exists() and driver is None:
        driver = last_driver(folder.parent.parent)
    return _status(RunView(folder, driver))


def _status(run: RunView) -> RunStatus:
    state, last = run.state(), run.lines[-1] if run.lines else {}
    trained: Line = next((line for line in reversed(run.lines) if "loss" in line), {})
    checkpoint, passed_over = _checkpoints(run)
    report = read_json(run.directory / DATA_REPORT)
    model = None
    if run.exported is not None:
        model = {"step": run.exported, "folder": (run.folder / FINAL).address}
    return RunStatus(
        name=run.folder.name,
        directory=run.folder.address,
        state=state,
        driver=run.driver.name if run.driver else None,
        quiet_s=run.quiet_s() if state in ("training", "starting") else None,
        logged_s=run.age(last.get("time")),
        step=run.step,
        n_steps=run.n_steps,
        epoch=last.get("epoch"),
        left_s=run.left_s() if state == "training" else None,
        training={m.key: trained[m.name] for m in TRAINING_SUMMARY if m.name in trained},
        evaluations=_evaluations(run),
        checkpoint=checkpoint,
        passed_over=passed_over,
        data={
            name: {key: part[key] for key in _DATA_COUNTS if key in part}
            for name, part in report.items()
        },
        events=count_events(run.directory),
        last_event=_last_event(run),
        model=model,
        values=run.record.get("values", {}),
        failure=run.record.get("failure"),
    )


def _evaluations(run: RunView) -> list[dict[str, Any]]:
    return [
        {
            "set": set_name(prefix) or None,
            "step": evaluation.step,
            "pairs": evaluation.pairs,
            "figures": {m.key: evaluation.value(m) for m in EVALUATION_SUMMARY},
        }
        for prefix, evaluation in latest(read_evaluations(run.directory, run.lines)).items()
    ]


def _checkpoints(run: RunView) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The newest checkpoint that is whole by its manifest and sizes, and newer ones."""
    passed_over: list[dict[str, Any]] = []
    for checkpoint in checkpoints(run.folder):
        step, manifest = int(checkpoint.name.removeprefix("step-")), checkpoint.path / MANIFEST
        try:
            damage = find_damage(checkpoint, read_files=False)
            committed = manifest.stat().st_mtime if damage is None else None
        except FileNotFoundError:
            continue  # it was deleted just now
        except NewerCheckpointError as error:
            passed_over.append({"step": step, "reason": str(error)})
            continue
        if damage is None:
            about = {"step": step, "age_s": run.age(committed), "folder": checkpoint.address}
            return about | {"checked": "manifest and sizes"}, passed_over
        if not manifest.exists():
            damage = f"it has no {MANIFEST}: it is being written, or its save was cut off"
        passed_over.append({"step": step, "reason": damage})
    return None, passed_over


def _last_event(run: RunView) -> dict[str, Any] | None:
    whole = [(time, text) for time, text in read_events(run.directory) if time is not None]
    return {"text": whole[-1][1], "age_s": run.age(whole[-1][0])} if whole else None
