"""One Ray Train run: workers, feed and settings put together; on the driver."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ray.train import UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from orpo_ray.config.schema import ConfigError, ORPOConfig
from orpo_ray.dataset.request import TRAIN
from orpo_ray.orchestration import cluster
from orpo_ray.orchestration.feed import FeedPlan, PlannedFeed
from orpo_ray.orchestration.worker import WorkerAnswer, WorkerTask
from orpo_ray.pretrained import ModelSource
from orpo_ray.runs.mirror import from_workers
from orpo_ray.storage.bucket import WORKERS, of_side
from orpo_ray.storage.mirror import fetch_folder

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
