"""Whether a run goes on, is finished or has stopped, and how far it is; from its files alone."""

import itertools
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.orchestration.run_lock import Driver
from orpo_ray.training.run_files import (
    CONFIG,
    FINAL,
    LEDGER,
    LOG,
    METRICS,
    PARTS,
    SECONDS,
    TRIAL_RECORD,
    exported_step,
    read_metrics,
)

Line = Mapping[str, Any]
# A run that wrote nothing for so long, and for so many times its usual pause, is a quiet one.
_QUIET_S, _QUIET_PAUSES = 300.0, 10
# Logged lines by which the pace is told.
_RECENT = 50


class RunView:
    """A run directory as it is now.

    Args:
        directory: of the run.
        driver: that claimed it last; of a trial, the driver of its sweep.
    """

    def __init__(self, directory: Path, driver: Driver | None) -> None:
        self.directory, self.driver, self.now = directory, driver, time.time()
        self.lines = read_metrics(directory)
        self.record = read_json(directory / TRIAL_RECORD)
        self.exported = exported_step(directory / FINAL)
        self.step: int | None = self.lines[-1]["step"] if self.lines else None
        self._config = _read_config(directory)
        self.n_steps = self._total_steps()

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
        return "stopped" if is_trial else "not heard of"

    def quiet_s(self) -> float | None:
        """Seconds since anything was written, if that is long for a run that goes on."""
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
        """By what the workers did in the last lines: time in which there were none is no pace."""
        recent = self.lines[-_RECENT:]
        n_steps = recent[-1]["step"] - recent[0]["step"]
        if self.n_steps is None or not n_steps:
            return None
        spent = sum(line.get(SECONDS + part, 0.0) for line in recent[1:] for part in PARTS)
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

    def _total_steps(self) -> int | None:
        """Optimizer steps of the whole run, as far as the config and the metrics tell."""
        if self._config is None:
            return None
        per_epoch = [round(line["step"] / line["epoch"]) for line in self.lines if line["step"]]
        if per_epoch:
            return self._config.total_steps(per_epoch[-1])
        return self._config.train.max_steps if self._config.train.max_steps > 0 else None


def _read_config(directory: Path) -> ORPOConfig | None:
    """The config of a run; None where it has none, or one of another version."""
    import yaml

    try:
        return ORPOConfig.model_validate(yaml.safe_load((directory / CONFIG).read_text()))
    except (OSError, ValueError, yaml.YAMLError):
        return None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is no file."""
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return content
