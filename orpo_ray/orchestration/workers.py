"""Ray Train workers: starting them on the driver, and what every rank runs."""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray.train
from ray.train import Checkpoint, CheckpointUploadMode, UserCallback

from orpo_ray.config.schema import ConfigError, ORPOConfig
from orpo_ray.dataset.request import TRAIN
from orpo_ray.dataset.stream import TokenStream
from orpo_ray.orchestration.answer import WorkerAnswer
from orpo_ray.orchestration.cluster import connection
from orpo_ray.orchestration.cluster.failures import (
    naming_missing_packages,
    out_of_memory_text,
)
from orpo_ray.orchestration.feed import PlannedFeed
from orpo_ray.orchestration.gauges import RunGauges
from orpo_ray.orchestration.start import Start
from orpo_ray.pretrained import ModelSource, UnsupportedModelError
from orpo_ray.runs.files import FINAL, STOP
from orpo_ray.runs.formatting import format_time
from orpo_ray.runs.manifest import NewerCheckpointError
from orpo_ray.runs.mirror import from_workers
from orpo_ray.runs.resume import ResumeError
from orpo_ray.storage.folder import WORKERS, Folder
from orpo_ray.training.errors import (
    EvaluationError,
    MicrobatchTooLargeError,
    NonFiniteError,
    NotSavedError,
    StoppedError,
    TrainingError,
)

if TYPE_CHECKING:
    import torch

ComputeMetrics = Callable[[Mapping[str, pa.Table]], dict[str, float]]
PROGRESS = "progress.jsonl"
_PROGRESS_S = 1.0
_CHECKPOINT_LIST = "checkpoint_manager_snapshot.json"
_log = logging.getLogger(__name__)


def train_worker(
    config: ORPOConfig,
    model: ModelSource,
    run_directory: Folder,
    evals: Sequence[str],
    compute_metrics: ComputeMetrics | None = None,
) -> WorkerAnswer:
    """Run the training loop on this rank; see `Work`, and `TrainingJob` for `compute_metrics`."""
    from orpo_ray.training.job import TrainingJob
    from orpo_ray.training.loop import run_training

    job = TrainingJob(
        config=config,
        model=model,
        run_directory=run_directory,
        train=ray.train.get_dataset_shard(TRAIN),
        evals=_streams(evals),
        device=_device(config),
        report=_report,
        watch=_watch(run_directory),
        preemption_notice=_preemption_notice,
        compute_metrics=compute_metrics or (lambda scores: {}),
    )
    # These would come back at every attempt: they are answers, not failures to start again from.
    try:
        figures = run_training(job)
        _report_model({**figures["after"], **figures["train"]})
        return WorkerAnswer()
    except (
        EvaluationError,
        NewerCheckpointError,
        ResumeError,
        UnsupportedModelError,
    ) as error:
        return WorkerAnswer(refusal=str(error))
    except StoppedError as error:
        return WorkerAnswer(stopped=str(error))
    except (NonFiniteError, NotSavedError) as error:
        return WorkerAnswer(failure=str(error))
    except MicrobatchTooLargeError as error:
        if ray.train.get_context().get_world_size() > 1:
            raise  # the other ranks wait for this one: Ray has to end them
        return WorkerAnswer(failure=str(error))


def evaluate_worker(
    config: ORPOConfig, model: ModelSource, run_directory: Folder, evals: Sequence[str]
) -> WorkerAnswer:
    """Evaluate the model on this rank; rank 0 writes a table of scores a set; see `Work`.

    Meanwhile it writes shares of what is done to `PROGRESS`, a line a second.
    """
    from orpo_ray.training.evaluation import run_evaluation

    notices: list[str] = []
    device = _device(config)
    try:
        found = run_evaluation(
            config, model.model, _streams(evals), device, notices.append, _progress(run_directory)
        )
    except UnsupportedModelError as error:
        return WorkerAnswer(refusal=str(error))
    for name, table in found.scores.items():
        with run_directory.make().replacing(scores_file(name)) as path:
            pq.write_table(table, path)
    return WorkerAnswer(found.metrics, tuple(notices))


def _progress(run_directory: Folder) -> Callable[[float], None]:
    """What writes shares of an evaluation for the driver: on rank 0 alone."""
    if ray.train.get_context().get_world_rank():
        return lambda share: None
    path = run_directory.make().path / PROGRESS
    next_at = 0.0

    def write(share: float) -> None:
        nonlocal next_at
        if share < 1 and time.monotonic() < next_at:
            return
        next_at = time.monotonic() + _PROGRESS_S
        with contextlib.suppress(OSError), path.open("a") as file:
            file.write(json.dumps({"share": share}) + "\n")

    return write


def scores_file(name: str) -> str:
    """The file in which `evaluate_worker` leaves the scores of a set, by its name in the feed."""
    return f"{name}.parquet"


def _streams(evals: Sequence[str]) -> dict[str, TokenStream]:
    """This rank's evaluation streams; a set's name in the feed is its metric prefix."""
    return {name: ray.train.get_dataset_shard(name) for name in evals}


def _device(config: ORPOConfig) -> "torch.device":
    """This rank's device."""
    import torch
    from ray.train.torch import get_device

    if config.ray.use_gpu:
        device: torch.device = get_device()
        return device
    return torch.device("cpu")


def _watch(run_directory: Folder) -> Callable[[Mapping[str, Any]], None]:
    """What shows this run's logged lines to Prometheus: on rank 0 alone."""
    if ray.train.get_context().get_world_rank():
        return lambda line: None
    return RunGauges(run_directory.path).show


def _report(metrics: Mapping[str, Any]) -> None:
    """Tell Ray Train of an evaluation.

    It is not told of checkpoints: it would keep a list of them that is torn or stale after some
    faults, refuse to start on it, and fail on a folder that is gone. Their manifests are enough.
    """
    ray.train.report(dict(metrics))


def _report_model(metrics: Mapping[str, Any]) -> None:
    """Tell Ray Train once of `final/`, as the run's only checkpoint; nothing is copied."""
    context = ray.train.get_context()
    storage = context.get_storage()
    final = f"{storage.experiment_fs_path}/{FINAL}"
    is_first = context.get_world_rank() == 0
    ray.train.report(
        dict(metrics),
        checkpoint=Checkpoint(final, storage.storage_filesystem) if is_first else None,
        checkpoint_dir_name=FINAL,
        checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
    )


def _preemption_notice() -> str | None:
    """Whether the cluster is about to take a node of this run away, and until when."""
    info = ray.train.get_preemption_info()
    if info is None:
        return None
    nodes = ", ".join(sorted(node[:12] for node in info.preempted_node_ids))
    deadline = f" by {format_time(info.deadline_ms / 1000)}" if info.deadline_ms else ""
    return f"node {nodes} is to be taken away{deadline}"


Work = Callable[[ORPOConfig, ModelSource, Folder, Sequence[str]], WorkerAnswer]
"""What every rank runs: given the config, base model and tokenizer, the run directory as workers
see it, and the names of the evaluation sets in the feed."""


def run_workers(work: Work, start: Start, callbacks: Sequence[UserCallback] = ()) -> WorkerAnswer:
    """Run `work` on every rank; returns rank 0's answer.

    Args:
        work: importable by name.
        start: Ray Train keeps its own state in the run directory as well.
        callbacks: of Ray Train, called at every report.

    Raises:
        ConfigError: for what the workers refuse.
        StoppedError: when training was asked to stop, once a checkpoint was saved.
        KeyboardInterrupt: when a signal ends the workers at once.
        TrainingError: for what another attempt would meet again, when the checkpoint of a stop
            was not saved, and when Ray Train's controller keeps dying.
        ray.train.TrainingFailedError: when workers keep failing.
    """
    from orpo_ray.orchestration.cluster.controller import Trainer, fit
    from orpo_ray.orchestration.cluster.process_group import torch_config

    config, folder, plans = start.config, start.folder, start.plans()
    # Ray Train's list of checkpoints, of an attempt that ended: it does not start where one of
    # them is gone, or where the file is torn.
    folder.remove(_CHECKPOINT_LIST)
    evals = tuple(name for name in plans if name != TRAIN)
    connection.ask_for_timeouts(config)

    def trainer() -> Trainer:
        return Trainer(
            partial(work, config, start.inputs.model, folder.on(WORKERS), evals),
            torch_config=torch_config(
                "cpu:gloo,cuda:nccl" if config.ray.use_gpu else "gloo",
                int(config.ray.process_group_timeout_s),
            ),
            scaling_config=connection.scaling(config),
            run_config=connection.run_settings(config, folder, list(callbacks)),
            datasets={name: plan.shard_list() for name, plan in plans.items()},
            dataset_config=PlannedFeed(plans),
        )

    try:
        with connection.reporting_waits(config), naming_missing_packages():
            is_asked = (folder.path / STOP).exists
            answer: WorkerAnswer = fit(trainer, config.ray.max_failures, is_asked)
    except BaseException as error:
        if text := out_of_memory_text(error):
            _log.warning(text)
        with contextlib.suppress(OSError):
            folder.fetch(from_workers)
        raise
    folder.fetch(from_workers)
    if answer.refusal:
        raise ConfigError(answer.refusal.splitlines())
    if answer.failure:
        raise TrainingError(answer.failure)
    if answer.stopped:
        raise StoppedError(answer.stopped)
    return answer
