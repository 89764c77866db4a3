"""Experiment trackers by `accelerate.tracking`: what is logged goes there too; on the driver.

They are fed from the run's files, so a worker that is started again logs nothing twice, and a
tracker that cannot be reached costs a run nothing but its lines there.
"""

import contextlib
import html
import importlib.util
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo_ray.config.schema import ConfigError, ORPOConfig
from orpo_ray.reports.page import fenced
from orpo_ray.runs.files import read_metrics
from orpo_ray.storage.files import one_line, read_json, write_json
from orpo_ray.storage.hiding import hide

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PROJECT = "orpo_ray"
_STATE, _STEPS = "trackers.json", "steps"
_MODULES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
}
# MLflow by itself tries for minutes to reach a server that is gone, at every line.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
_NOT_LOGGED = ("step", "time")
_log = logging.getLogger(__name__)


class Trackers:
    """The trackers of a run, to be closed; goes on with what an earlier driver began there.

    Args:
        config: of the run; `report_to` names them.
        run_directory: of the run.

    Raises:
        ConfigError: for one that is not installed, or cannot be reached now.
    """

    def __init__(self, config: ORPOConfig, run_directory: Path) -> None:
        self._directory = run_directory
        self._state: dict[str, Any] = read_json(run_directory / _STATE)
        self._trackers: dict[str, GeneralTracker] = {}
        # The last step that each tracker has, also of a driver that was killed.
        self._steps: dict[str, int] = self._state.setdefault(_STEPS, {})
        refuse_missing(config.output.report_to)
        for variable, value in _PATIENCE.items():
            os.environ.setdefault(variable, value)
        if not config.output.report_to:
            return
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState(cpu=True)  # its own logging wants it; of this one process
        for name in config.output.report_to:
            tracker = LOGGER_TYPE_TO_CLASS[name](**self._arguments(name))
            # There is no process group here, and no other process that logs.
            tracker.main_process_only = False
            try:
                tracker.start()
                # MLflow refuses other values than a run began with; trackio forgets them.
                if name not in self._state or name == "trackio":
                    tracker.store_init_configuration(_flat(config))
            except Exception as error:
                problem = f"report_to: {name} cannot be used: {one_line(error)}"
                raise ConfigError([problem]) from error
            self._trackers[name] = tracker
            self._steps[name] = self._step_of(name)
            self._state[name] = self._mlflow_run if name == "mlflow" else run_directory.name
        write_json(run_directory / _STATE, self._state)

    def close(self) -> None:
        """End what is tracked."""
        self._each(lambda _, tracker: tracker.finish())

    def log(self, line: Mapping[str, Any]) -> None:
        """Log a line of `metrics.jsonl` under its step to the trackers that do not have it yet.

        So a step that is done again is there once. What is not finite is left out.
        """
        values = {
            name: float(value)
            for name, value in line.items()
            if name not in _NOT_LOGGED and value is not None and math.isfinite(value)
        }

        def log(name: str, tracker: "GeneralTracker") -> None:
            if line["step"] <= self._steps[name]:
                return
            # MLflow's run is that of a thread, and this may be another one.
            more = {"run_id": self._mlflow_run} if name == "mlflow" else {}
            tracker.log(values, step=line["step"], **more)
            self._steps[name] = line["step"]

        before = dict(self._steps)
        self._each(log)
        if self._steps != before:
            with contextlib.suppress(OSError):  # a full disk; the next line is written down
                write_json(self._directory / _STATE, self._state)

    def log_texts(self, texts: Mapping[str, str]) -> None:
        """Log documents by name: resolved config, data report, final tables; without secrets."""
        texts = {title: hide(text) for title, text in texts.items()}

        def log(name: str, tracker: "GeneralTracker") -> None:
            if name == "mlflow":
                import mlflow

                for title, text in texts.items():
                    mlflow.log_text(text, title, run_id=self._mlflow_run)
            elif name == "wandb":
                import wandb

                for title, text in texts.items():
                    tracker.log({title: wandb.Html(f"<pre>{html.escape(text)}</pre>")})
            elif name == "trackio":
                import trackio

                for title, text in texts.items():
                    tracker.log({title: trackio.Markdown(fenced(text))})
            elif name == "tensorboard":
                for title, text in texts.items():
                    tracker.log({title: fenced(text)})

        self._each(log)

    def _step_of(self, name: str) -> int:
        """The last step that a tracker has; -1 where it has none."""
        if name in self._steps:
            return self._steps[name]
        lines = read_metrics(self._directory) if name in self._state else []
        return max((line["step"] for line in lines), default=-1)  # as an earlier version left it

    @property
    def _mlflow_run(self) -> str:
        return str(self._trackers["mlflow"].tracker.info.run_id)

    def _arguments(self, name: str) -> dict[str, Any]:
        run = self._directory.name
        if name == "tensorboard":
            return {"run_name": "tensorboard", "logging_dir": str(self._directory)}
        if name == "mlflow":
            return {"experiment_name": PROJECT, "run_name": run, "run_id": self._state.get(name)}
        if name == "wandb":
            more = {"id": run, "resume": "allow", "dir": str(self._directory)}
            return {"run_name": PROJECT, "name": run, **more}
        return {"run_name": PROJECT, "name": run, "resume": "allow"}

    def _each(self, act: Callable[[str, "GeneralTracker"], None]) -> None:
        """Do something with every tracker, and give up those where it fails."""
        for name, tracker in list(self._trackers.items()):
            try:
                act(name, tracker)
            except Exception as error:
                reason = one_line(f"{type(error).__name__}: {error}")
                _log.warning("report_to: %s is given up: %s", name, reason)
                del self._trackers[name]


def refuse_missing(names: Sequence[str]) -> None:
    """Stop where a tracker is not installed.

    Raises:
        ConfigError: with what to install.
    """
    missing = [
        name
        for name in names
        if not any(importlib.util.find_spec(module) for module in _MODULES[name])
    ]
    if missing:
        raise ConfigError(
            [f"report_to: {n} is not installed: pip install 'orpo_ray[{n}]'" for n in missing]
        )


def _flat(config: ORPOConfig) -> dict[str, Any]:
    """Every setting by its own name; what is more than a figure or a text as JSON."""
    return {
        name: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for section, values in config.model_dump(mode="json").items()
        for name, value in (values.items() if section != "search" else ())
    }
