"""When a run's checkpoints are written, and which one it resumes from; in training workers."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.runs.files import RunFiles
from orpo_ray.runs.manifest import checkpoint_directory, newest_checkpoint, read_manifest
from orpo_ray.runs.resume import changed_settings, refuse_changes, settings_hash
from orpo_ray.training.checkpoint.evaluations import Evaluations
from orpo_ray.training.checkpoint.saver import CheckpointSaver, Progress, load_checkpoint
from orpo_ray.training.step import TrainState

# Seconds between two polls of a save in progress, of preemption notices and of a request to stop.
_POLL_S = 1.0


@dataclass(frozen=True)
class Snapshot:
    """What the loop gives a checkpoint besides the tensors of the model and its optimizer.

    Args:
        progress: stored in the checkpoint.
        position: in the data, for the manifest.
    """

    progress: Progress
    position: dict[str, int]


class CheckpointSchedule:
    """Restores the newest valid checkpoint and decides when the next one is saved.

    Every rank makes the same calls. `stops` is set once the run was asked to stop; a checkpoint is
    due then. `finishes` is set once it was asked to end after its next step, and `evaluates` while
    an evaluation after it is asked for. `problem` is why the last save failed.

    Args:
        config: the run's config, with its intervals in steps.
        settings: `decisive_settings` of the run.
        files: of the run directory.
        state: what is saved and restored.
        evaluations: so far; with `load_best_model_at_end` the best one's step is saved and kept.
        preemption_notice: polled about once a second; a text when a node is about to be preempted.
    """

    def __init__(
        self,
        config: ORPOConfig,
        settings: dict[str, Any],
        files: RunFiles,
        state: TrainState,
        evaluations: Evaluations,
        preemption_notice: Callable[[], str | None],
    ) -> None:
        self._config = config
        self._settings = settings
        self._files = files
        self._state = state
        self._evaluations = evaluations
        self._preemption_notice = preemption_notice
        self._saver = CheckpointSaver(files.folder, config.train.save_total_limit)
        self._saving_step = self._committed_step = -1
        self._retry_at: int | None = None
        self._last_notice: str | None = None
        self.stops = self.finishes = self.evaluates = self._saves = False
        self._requests = (0, 0)
        self.problem: str | None = None
        self._must_wait = False
        self._polled = (0, time.perf_counter())
        self._next_poll = 0

    def restore(self) -> Progress | None:
        """Load the newest checkpoint that verifies, found by rank 0 for all.

        Raises:
            ResumeError: when it was made with other settings or data, unless that is wanted.
        """
        found: list[dict[str, Any] | None] = [None]
        run = self._files.folder
        if self._files.is_writer:
            step = newest_checkpoint(run, self._set_aside)
            if step is not None:
                found = [read_manifest(checkpoint_directory(run, step))]
        dist.broadcast_object_list(found)
        manifest = found[0]
        if manifest is None:
            return None
        self._allow(manifest)
        self._committed_step = self._next_poll = manifest["step"]
        self._polled = (self._next_poll, time.perf_counter())
        state = self._state
        return load_checkpoint(run, manifest["step"], state.model, state.optimizer)

    @property
    def saved_step(self) -> int:
        """The step of the newest checkpoint; -1 where there is none."""
        return self._committed_step

    def asked_to_stop(self) -> bool:
        """Whether the run was asked to stop before its next step; a collective."""
        stops = torch.tensor([self._files.stop_requested], dtype=torch.long)
        stops = stops.to(self._state.device)
        dist.broadcast(stops, 0)
        return bool(stops.item())

    def is_due(self, step: int, last: bool) -> bool:
        """Whether to save a checkpoint after a step; finishes a save that is ready.

        Args:
            step: optimizer steps done.
            last: whether there is none after it.
        """
        self._saver.prepare(self._state.model, self._state.optimizer)
        self._must_wait = self._poll(step) or last
        every = self._config.train.save_steps
        due = step == self._retry_at or (every is not None and step % int(every) == 0)
        due = due or step in self._ranking[:1] or self._saves
        return step != self._committed_step and (self._must_wait or due)

    def save(self, snapshot: Snapshot) -> None:
        """Save the checkpoint that is due.

        It is written beside the following steps, but for the last one and one before a node is
        preempted or the run stops: those are waited for.
        """
        step = snapshot.progress.step
        self._finish(step)
        self._retry_at, self._saves = None, False
        problem = self._files.sync()
        about = snapshot.position | {
            "step": step,
            "world_size": dist.get_world_size(),
            "pairs_per_worker": self._config.pairs_per_worker,
            "config_hash": settings_hash(self._settings),
            "settings": self._settings,
        }
        state = self._state
        self._saver.start(
            state.model, state.optimizer, snapshot.progress, about, problem, self._ranking
        )
        self._saving_step = step
        if self._must_wait:
            self._finish(step)

    @property
    def _ranking(self) -> tuple[int, ...]:
        """Steps whose checkpoints are kept, the best evaluation's first."""
        return self._evaluations.ranking if self._evaluations.keep_best else ()

    def _poll(self, step: int) -> bool:
        """Finish a save that is ready; whether to save at once."""
        if step < self._next_poll:
            return False
        if self._saver.is_busy and self._agree(int(self._saver.is_ready)):
            self._finish(step)
        notice = self._preemption_notice()
        (polled_step, polled_at), now = self._polled, time.perf_counter()
        pace_s = max(1e-6, (now - polled_at) / max(1, step - polled_step))
        stops = 2 * self._files.stop_requested + self._files.finish_requested
        # Ranks measure different times, and have to poll at the same step.
        found = [max(1, int(_POLL_S / pace_s)), stops, *self._files.requests()]
        agreed = torch.tensor(found, device=self._state.device)
        dist.broadcast(agreed, 0)
        stride, stops, *requests = agreed.tolist()
        self._saves = self._saves or requests[0] > self._requests[0]
        self.evaluates = self.evaluates or requests[1] > self._requests[1]
        self._requests = (requests[0], requests[1])
        self._polled, self._next_poll = (step, now), step + stride
        self.finishes = stops == 1
        if stops > 1:
            self.stops = True
            return True
        if notice is None or notice == self._last_notice:
            return False
        self._last_notice = notice
        self._files.event(f"step {step}: {notice}; saving at once", preemption_notices=1)
        return True

    def _agree(self, flag: int) -> bool:
        """Whether the flag is set on every rank."""
        flags = torch.tensor([flag], device=self._state.device)
        dist.all_reduce(flags, dist.ReduceOp.MIN)
        return bool(flags.item())

    def _finish(self, step: int) -> None:
        """Wait for the save in progress, if there is one, and log its failure."""
        if not self._saver.is_busy:
            return
        problem = self.problem = self._saver.finish()
        if problem is None:
            self._committed_step, self._retry_at = self._saving_step, None
            return
        self._retry_at = step + max(1, int(self._config.train.save_steps or step) // 10)
        self._files.event(
            f"ALARM: the checkpoint of step {self._saving_step} was not saved: {problem}; "
            f"training continues, the next attempt is after step {self._retry_at}",
            saves_failed=1,
        )

    def _allow(self, manifest: dict[str, Any]) -> None:
        """Refuse to resume with other settings, or log them with `resume_changed`."""
        folder, data_digest = self._files.folder, self._settings["train_data"]
        refuse_changes(folder, manifest, self._config, data_digest)
        for line in changed_settings(manifest["settings"], self._settings):
            self._files.event(f"resuming with resume_changed=true: {line}", settings_changed=1)

    def _set_aside(self, name: str, reason: str) -> None:
        self._files.event(f"checkpoint {name} set aside: {reason}", checkpoints_set_aside=1)
