"""What Ray Train runs on every rank: hand the training floor its job, and take its answer.

The training floor is imported by the ranks only: Ray also loads this module on the driver and in
the actors that watch over a run, which would wait seconds for it and need nothing of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train
import ray.train.torch
from ray.train import Checkpoint, CheckpointUploadMode

from orpo_ray.config import ORPOConfig
from orpo_ray.orchestration.feed import TRAIN
from orpo_ray.preference.stream import TokenStream
from orpo_ray.training.errors import (
    MicrobatchTooLargeError,
    NonFiniteError,
    ResumeError,
    UnsupportedModelError,
)
from orpo_ray.training.model_source import ModelSource
from orpo_ray.training.run_files import RunFiles

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class WorkerTask:
    """One run, as every rank is told of it.

    Args:
        config: the run.
        model: where base model and tokenizer are.
        run_directory: absolute path, the same on every node.
        evals: evaluation sets by their name in the feed, which is their metric prefix.
        data_report: for the model card.
        version: of this project.
    """

    config: ORPOConfig
    model: ModelSource
    run_directory: str
    evals: tuple[str, ...]
    data_report: dict[str, Any]
    version: str


@dataclass(frozen=True)
class WorkerAnswer:
    """How a run ended: its figures, or why another attempt would end the same way.

    Args:
        figures: `summary` of the run; empty when it failed.
        refusal: a message for whoever wrote the config.
        failure: a message about the training itself.
    """

    figures: dict[str, dict[str, float]]
    refusal: str | None = None
    failure: str | None = None


def train_worker(loop_config: dict[str, WorkerTask]) -> WorkerAnswer:
    """Run the training loop on this rank."""
    from orpo_ray.training.loop import TrainingJob, run_training

    task = loop_config["task"]
    job = TrainingJob(
        config=task.config,
        model=task.model,
        run_directory=task.run_directory,
        train=ray.train.get_dataset_shard(TRAIN),
        evals=_eval_streams(task),
        data_report=task.data_report,
        version=task.version,
        device=_device(task),
        report=_Reporter(task.run_directory),
    )
    # These would come back at every attempt: they are answers, not failures to start again from.
    try:
        return WorkerAnswer(run_training(job))
    except (ResumeError, UnsupportedModelError) as error:
        return WorkerAnswer({}, refusal=str(error))
    except NonFiniteError as error:
        return WorkerAnswer({}, failure=str(error))
    except MicrobatchTooLargeError as error:
        if ray.train.get_context().get_world_size() > 1:
            raise  # the other ranks wait for this one: Ray has to end them
        return WorkerAnswer({}, failure=str(error))


def evaluate_worker(loop_config: dict[str, WorkerTask]) -> WorkerAnswer:
    """Evaluate the task's model on this rank."""
    from orpo_ray.training.evaluation import run_evaluation

    task = loop_config["task"]
    evals = _eval_streams(task)
    files = RunFiles(Path(task.run_directory), ray.train.get_context().get_world_rank() == 0)
    files.directory.mkdir(parents=True, exist_ok=True)
    model, device = task.model.model, _device(task)
    try:
        metrics = run_evaluation(task.config, model, evals, device, files.notice)
    except UnsupportedModelError as error:
        return WorkerAnswer({}, refusal=str(error))
    return WorkerAnswer({"after": metrics})


def _eval_streams(task: WorkerTask) -> dict[str, TokenStream]:
    """This rank's evaluation streams; a set's name in the feed is its metric prefix."""
    return {name: ray.train.get_dataset_shard(name) for name in task.evals}


def _device(task: WorkerTask) -> "torch.device":
    """This rank's device."""
    import torch

    if task.config.ray.use_gpu:
        device: torch.device = ray.train.torch.get_device()
        return device
    return torch.device("cpu")


@dataclass(frozen=True)
class _Reporter:
    """Tells Ray Train of an evaluation, or of a checkpoint that is already in its place."""

    run_directory: str

    def __call__(self, metrics: Mapping[str, Any], name: str | None) -> None:
        if name is None:
            ray.train.report(dict(metrics))
            return
        ray.train.report(
            dict(metrics),
            checkpoint=Checkpoint.from_directory(str(Path(self.run_directory, name))),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )
