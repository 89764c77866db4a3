"""When a run's checkpoints are written and what comes of them; in training workers."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.runs.files import RunFiles
from orpo_ray.runs.manifest import checkpoint_directory, newest_checkpoint, read_manifest
from orpo_ray.runs.resume import ResumeError, changed_settings, refuse_changes, settings_hash
from orpo_ray.training.checkpoint.best import Evaluations
from orpo_ray.training.checkpoint.saver import CheckpointSaver, TrainState, load_checkpoint
from orpo_ray.training.step import Trainee

# Seconds between two looks at a save under way and at notices of preemption.
_LOOK_S = 1.0


class CheckpointKeeper:
    """Finds the checkpoint to go on from, and saves beside the steps; all ranks call it alike.

    Args:
        config: of the run.
        settings: `decisive_settings` of it.
        files: of the run directory.
        trainee: what is saved and restored.
        evaluations: so far; where the best is wanted, its step is saved and kept.
        leaving: asked now and then; a text once this worker's node is about to be taken away.

    `stops` is set once the run was asked to stop; a checkpoint is saved then.
    """

    def __init__(
        self,
        config: ORPOConfig,
        settings: dict[str, Any],
        files: RunFiles,
        trainee: Trainee,
        evaluations: Evaluations,
        leaving: Callable[[], str | None],
    ) -> None:
        self._config = config
        self._settings = settings
        self._files = files
        self._trainee = trainee
        self._evaluations = evaluations
        self._leaving = leaving
        self._saver = CheckpointSaver(str(files.directory), config.train.save_total_limit)
        self._saving_step = self._committed_step = -1
        self._retry_at: int | None = None
        self._heard: str | None = None
        self.stops = False
        self._looked = (0, time.perf_counter())
        self._next_look = 0

    def restore(self) -> TrainState | None:
        """Load the newest checkpoint that verifies, found by rank 0 for all.

        Raises:
            ResumeError: when it was made with other settings or data, unless that is wanted.
        """
        found: list[dict[str, Any] | None] = [None]
        directory = self._files.directory
        if self._files.is_writer:
            step = newest_checkpoint(str(directory), self._set_aside)
            if step is not None:
                found = [read_manifest(checkpoint_directory(directory, step))]
        dist.broadcast_object_list(found)
        manifest = found[0]
        if manifest is None:
            return None
        self._allow(manifest)
        self._committed_step = self._next_look = manifest["step"]
        self._looked = (self._next_look, time.perf_counter())
        trainee = self._trainee
        return load_checkpoint(str(directory), manifest["step"], trainee.model, trainee.optimizer)

    def after_step(
        self, step: int, last: bool, state: Callable[[], tuple[TrainState, dict[str, Any]]]
    ) -> None:
        """Save if it is time to; the last step's save is waited for, and so is one before a kill.

        Args:
            step: optimizer steps done.
            last: whether there is none after it.
            state: gives what is saved besides the tensors, and the position for the manifest; a
                collective.
        """
        leaving = self._look(step)
        ranking = self._evaluations.ranking if self._evaluations.keep_best else ()
        due = step == self._retry_at or step % self._config.train.save_steps == 0
        due = due or step in ranking[:1]
        if step == self._committed_step or not (last or leaving or due):
            return
        self._finish(step)
        self._retry_at = None
        train_state, position = state()
        problem = self._files.sync()
        about = position | {
            "step": step,
            "world_size": dist.get_world_size(),
            "config_hash": settings_hash(self._settings),
            "settings": self._settings,
        }
        trainee = self._trainee
        self._saver.start(trainee.model, trainee.optimizer, train_state, about, problem, ranking)
        self._saving_step = step
        if last or leaving:
            self._finish(step)

    def _look(self, step: int) -> bool:
        """Take up a save that has ended; whether there is reason to save at once."""
        if step < self._next_look:
            return False
        if self._saver.is_busy and self._agree(int(self._saver.is_ready)):
            self._finish(step)
        text = self._leaving()
        (looked_step, looked_at), now = self._looked, time.perf_counter()
        pace_s = max(1e-6, (now - looked_at) / max(1, step - looked_step))
        stops = self._files.stop_requested
        told = torch.tensor([max(1, int(_LOOK_S / pace_s)), stops], device=self._trainee.device)
        dist.broadcast(told, 0)  # ranks measure different times, and have to look together
        stride, stops = told.tolist()
        self._looked, self._next_look = (step, now), step + stride
        if stops:
            self.stops = True
            return True
        if text is None or text == self._heard:
            return False
        self._heard = text
        self._files.event(f"step {step}: {text}; saving at once", preemption_notices=1)
        return True

    def _agree(self, flag: int) -> bool:
        """Whether the flag is set on every rank."""
        flags = torch.tensor([flag], device=self._trainee.device)
        dist.all_reduce(flags, dist.ReduceOp.MIN)
        return bool(flags.item())

    def _finish(self, step: int) -> None:
        """Wait for the save under way, if there is one, and say when it failed."""
        if not self._saver.is_busy:
            return
        problem = self._saver.finish()
        if problem is None:
            self._committed_step, self._retry_at = self._saving_step, None
            return
        self._retry_at = step + max(1, self._config.train.save_steps // 10)
        self._files.event(
            f"ALARM: the checkpoint of step {self._saving_step} was not saved: {problem}; "
            f"training goes on, the next attempt is after step {self._retry_at}",
            saves_failed=1,
        )

    def _allow(self, manifest: dict[str, Any]) -> None:
        """Refuse to go on as another run, or say that it is wanted."""
        before, now = manifest["global_batch_pairs"], self._config.pairs_per_step
        if before != now:
            raise ResumeError(
                f"{self._files.directory}: its checkpoint counts {before} pairs a step, this "
                f"config {now}; set global_batch_size={before}, or another run_name"
            )
        if not self._config.train.resume_changed:
            refuse_changes(manifest, self._settings)
            return
        for line in changed_settings(manifest["settings"], self._settings):
            self._files.event(f"going on with resume_changed=true: {line}", settings_changed=1)

    def _set_aside(self, name: str, reason: str) -> None:
        self._files.event(f"checkpoint {name} set aside: {reason}", checkpoints_set_aside=1)


def position(step: int, steps_per_epoch: int, global_batch_pairs: int) -> dict[str, int]:
    """Where in the data a step ends, for its manifest."""
    epoch, batch = divmod(step, steps_per_epoch)
    return {
        "epoch": epoch,
        "batch_of_epoch": batch,
        "global_batch_pairs": global_batch_pairs,
    }


def run_files(directory: str) -> RunFiles:
    """The files of a run directory, written by rank 0 alone."""
    return RunFiles(Path(directory), dist.get_rank() == 0)
