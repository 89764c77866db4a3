"""What Ray Train runs on every rank: hand the training floor its job, and take its answer.

The training floor is imported by the ranks only: Ray also loads this module on the driver and in
the actors that watch over a run, which would wait seconds for it and need nothing of it.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train
import ray.train.torch

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.dataset.request import TRAIN
from orpo_ray.dataset.stream import TokenStream
from orpo_ray.orchestration.gauges import RunGauges
from orpo_ray.pretrained import ModelSource, UnsupportedModelError
from orpo_ray.runs.files import RunFiles
from orpo_ray.runs.resume import ResumeError
from orpo_ray.training.errors import (
    EvaluationError,
    MicrobatchTooLargeError,
    NonFiniteError,
    StoppedError,
)

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
    """

    config: ORPOConfig
    model: ModelSource
    run_directory: str
    evals: tuple[str, ...]


@dataclass(frozen=True)
class WorkerAnswer:
    """How a run ended: its figures, or why another attempt would end the same way.

    Args:
        figures: `summary` of the run; empty when it failed.
        refusal: a message for whoever wrote the config.
        failure: a message about the training itself.
        stopped: where it stopped, when it was asked to.
    """

    figures: dict[str, dict[str, float]]
    refusal: str | None = None
    failure: str | None = None
    stopped: str | None = None


def train_worker(loop_config: dict[str, WorkerTask]) -> WorkerAnswer:
    """Run the training loop on this rank."""
    from orpo_ray.training.job import TrainingJob
    from orpo_ray.training.loop import run_training

    task = loop_config["task"]
    job = TrainingJob(
        config=task.config,
        model=task.model,
        run_directory=task.run_directory,
        train=ray.train.get_dataset_shard(TRAIN),
        evals=_eval_streams(task),
        device=_device(task),
        report=_report,
        watch=_watch(task),
        leaving=_leaving,
    )
    # These would come back at every attempt: they are answers, not failures to start again from.
    try:
        return WorkerAnswer(run_training(job))
    except (EvaluationError, ResumeError, UnsupportedModelError) as error:
        return WorkerAnswer({}, refusal=str(error))
    except StoppedError as error:
        return WorkerAnswer({}, stopped=str(error))
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


def _watch(task: WorkerTask) -> Callable[[Mapping[str, Any]], None]:
    """What shows this run's logged lines to Prometheus: on rank 0 alone."""
    if ray.train.get_context().get_world_rank():
        return lambda line: None
    return RunGauges(Path(task.run_directory)).show


def _report(metrics: Mapping[str, Any]) -> None:
    """Tell Ray Train of an evaluation.

    It is not told of checkpoints: it would keep a list of them that is torn or stale after some
    faults, refuse to start on it, and fail on a folder that is gone. Their manifests are enough.
    """
    ray.train.report(dict(metrics))


def _leaving() -> str | None:
    """Whether the cluster is about to take a node of this run away, and until when."""
    info = ray.train.get_preemption_info()
    if info is None:
        return None
    nodes = ", ".join(sorted(node[:12] for node in info.preempted_node_ids))
    until = f" by {time.strftime('%H:%M:%S', time.localtime(info.deadline_ms / 1000))}"
    return f"node {nodes} is to be taken away{until if info.deadline_ms else ''}"
