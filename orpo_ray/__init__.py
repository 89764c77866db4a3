"""ORPO preference training on Ray: no wasted token, nothing lost, nothing hidden."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from orpo_ray.version import __version__

if TYPE_CHECKING:
    from orpo_ray.config.schema import ConfigError
    from orpo_ray.orchestration.evaluate import evaluate
    from orpo_ray.orchestration.sweep.tune import SweepResult, trainable, tune
    from orpo_ray.orchestration.train import TrainResult, prepare, train
    from orpo_ray.orchestration.trainer.trainer import ORPOTrainer
    from orpo_ray.preference.errors import DataError
    from orpo_ray.runs.statistics import EvaluationResult
    from orpo_ray.training.errors import StoppedError, TrainingError
    from orpo_ray.trl.arguments import ORPOConfig

__all__ = [
    "ConfigError",
    "DataError",
    "EvaluationResult",
    "ORPOConfig",
    "ORPOTrainer",
    "StoppedError",
    "SweepResult",
    "TrainResult",
    "TrainingError",
    "__version__",
    "evaluate",
    "prepare",
    "train",
    "trainable",
    "tune",
]

# The package is silent until an application configures logging; the commands do.
logging.getLogger(__name__).addHandler(logging.NullHandler())

# Imported on first use, so that `--help` and a bad config need neither torch nor ray.
_HOME = {
    "ConfigError": "orpo_ray.config.schema",
    "DataError": "orpo_ray.preference.errors",
    "EvaluationResult": "orpo_ray.runs.statistics",
    "ORPOConfig": "orpo_ray.trl.arguments",
    "ORPOTrainer": "orpo_ray.orchestration.trainer.trainer",
    "StoppedError": "orpo_ray.training.errors",
    "SweepResult": "orpo_ray.orchestration.sweep.tune",
    "TrainResult": "orpo_ray.orchestration.train",
    "TrainingError": "orpo_ray.training.errors",
    "evaluate": "orpo_ray.orchestration.evaluate",
    "prepare": "orpo_ray.orchestration.train",
    "train": "orpo_ray.orchestration.train",
    "trainable": "orpo_ray.orchestration.sweep.tune",
    "tune": "orpo_ray.orchestration.sweep.tune",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
