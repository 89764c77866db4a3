"""Ray Train workers: starting them on the driver, and what every rank runs."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train
import ray.train.torch
from ray.train import UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from orpo_ray.config.schema import ConfigError, ORPOConfig
from orpo_ray.dataset.request import TRAIN
from orpo_ray.dataset.stream import TokenStream
from orpo_ray.orchestration import cluster
from orpo_ray.orchestration.feed import FeedPlan, PlannedFeed
from orpo_ray.orchestration.gauges import RunGauges
from orpo_ray.pretrained import ModelSource, UnsupportedModelError
from orpo_ray.runs.files import RunFiles
from orpo_ray.runs.mirror import from_workers
from orpo_ray.runs.resume import ResumeError
from orpo_ray.storage.bucket import WORKERS, of_side
from orpo_ray.storage.mirror import fetch_folder
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
        preemption_notice=_preemption_notice,
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


def _preemption_notice() -> str | None:
    """Whether the cluster is about to take a node of this run away, and until when."""
    info = ray.train.get_preemption_info()
    if info is None:
        return None
    nodes = ", ".join(sorted(node[:12] for node in info.preempted_node_ids))
    until = f" by {time.strftime('%H:%M:%S', time.localtime(info.deadline_ms / 1000))}"
    return f"node {nodes} is to be taken away{until if info.deadline_ms else ''}"


Work = Callable[[dict[str, WorkerTask]], WorkerAnswer]


class TrainingError(RuntimeError):
    """Training stopped for a reason of its own, which another attempt would meet again."""


@dataclass(frozen=True)
class Fit:
    """What Ray Train is given.

    Args:
        config: settled by `cluster.with_cluster`.
        model: base model and tokenizer.
        run_directory: where the run and Ray Train's own state of it are kept.
        plans: the feed, by data set name.
        callbacks: of Ray Train, told of every report.
    """

    config: ORPOConfig
    model: ModelSource
    run_directory: Path
    plans: Mapping[str, FeedPlan]
    callbacks: Sequence[UserCallback] = ()

    def run(self, work: Work) -> WorkerAnswer:
        """Run `work` on every rank; returns rank 0's answer.

        Raises:
            ConfigError: for what the workers refuse.
            TrainingError: for what another attempt would meet again.
            ray.train.TrainingFailedError: when workers keep failing.
        """
        task = WorkerTask(
            config=self.config,
            model=self.model,
            run_directory=str(of_side(self.run_directory, WORKERS)),
            evals=tuple(name for name in self.plans if name != TRAIN),
        )
        cluster.ask_for_timeouts(self.config)
        backend = "cpu:gloo,cuda:nccl" if self.config.ray.use_gpu else "gloo"
        trainer = TorchTrainer(
            work,
            train_loop_config={"task": task},
            torch_config=TorchConfig(
                backend=backend, timeout_s=int(self.config.ray.process_group_timeout_s)
            ),
            scaling_config=cluster.scaling(self.config),
            run_config=cluster.run_settings(self.config, self.run_directory, list(self.callbacks)),
            datasets={name: plan.shard_list() for name, plan in self.plans.items()},
            dataset_config=PlannedFeed(self.plans),
        )
        try:
            answer: WorkerAnswer = trainer.fit().return_value
        except BaseException:
            with contextlib.suppress(OSError):
                fetch_folder(self.run_directory, from_workers)
            raise
        fetch_folder(self.run_directory, from_workers)
        if answer.refusal:
            raise ConfigError(answer.refusal.splitlines())
        if answer.failure:
            raise TrainingError(answer.failure)
        return answer
