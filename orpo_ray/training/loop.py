"""The training loop of one worker: restore, step, log, evaluate, save, export.

It needs a process group and nothing of Ray: batches come from an iterator and what it reports
goes to a function, so it runs under torchrun as well.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from orpo_ray.config import ORPOConfig
from orpo_ray.objective.metrics import N_SUMS, OrpoWeights, metrics_from_sums
from orpo_ray.preference.stream import StepBatch, TokenStream
from orpo_ray.training.checkpoint import (
    TrainState,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from orpo_ray.training.errors import ResumeError
from orpo_ray.training.evaluation import evaluate_streams
from orpo_ray.training.export import export_model, exported_step, write_model_card
from orpo_ray.training.model_source import ModelSource
from orpo_ray.training.optimizer import build_optimizer, build_scheduler
from orpo_ray.training.run_files import FINAL, RunFiles, read_metrics, summary
from orpo_ray.training.sharding import build_model, use_bf16
from orpo_ray.training.step import Trainee, train_step
from orpo_ray.training.verify import settle_attention

Report = Callable[[Mapping[str, Any], str | None], None]


@dataclass(frozen=True)
class TrainingJob:
    """All that one worker is given.

    Args:
        config: the run.
        model: where base model and tokenizer are.
        run_directory: absolute path.
        train: this rank's training stream.
        evals: this rank's evaluation streams by metric prefix (`eval_`, `eval_<name>_`).
        data_report: what `data_report.json` holds, for the model card.
        version: of this project.
        device: of this rank.
        report: told of every evaluation and every committed checkpoint, by all ranks together:
            the latest metrics, and the checkpoint's name below the run directory or None.
    """

    config: ORPOConfig
    model: ModelSource
    run_directory: str
    train: TokenStream
    evals: Mapping[str, TokenStream]
    data_report: Mapping[str, Any]
    version: str
    device: torch.device
    report: Report


def run_training(job: TrainingJob) -> dict[str, dict[str, float]]:
    """Train to the end, from the newest checkpoint if there is one, and export the model.

    Returns:
        `summary` of the run directory.

    Raises:
        NonFiniteError: before an update that would not be finite.
        ResumeError: when the checkpoint was made with another global batch size.
    """
    loop = _Loop(job)
    loop.settle_attention()  # by the base model: a resumed run has to decide the same
    loop.restore()
    loop.run()
    loop.finish()
    return summary(Path(job.run_directory))


@dataclass
class _Window:
    """What happened since the last logged step."""

    sums: Tensor
    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    pairs: int = 0
    norm: Tensor | None = None


@dataclass
class _Loop:
    job: TrainingJob
    step: int = 0
    saved_step: int = -1
    latest: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        job, config = self.job, self.job.config
        self.files = RunFiles(Path(job.run_directory), dist.get_rank() == 0)
        self.n_steps = config.total_steps(job.train.steps_per_epoch)
        model = build_model(config, job.model.model, job.device)
        optimizer = build_optimizer(model, config.train)
        self.trainee = Trainee(
            model=model,
            optimizer=optimizer,
            scheduler=build_scheduler(optimizer, config.train, self.n_steps),
            beta=config.orpo.beta,
            max_grad_norm=config.train.max_grad_norm,
            seed=config.train.seed,
            device=job.device,
        )
        self.weights = OrpoWeights(config.orpo.beta, model.router_coef)
        self.window = _Window(self._no_sums())

    def _no_sums(self) -> Tensor:
        return torch.zeros(N_SUMS, dtype=torch.float64, device=self.job.device)

    def restore(self) -> None:
        """Go to the newest checkpoint that verifies, found by rank 0 for all."""
        found: list[int | None] = [None]
        if self.files.is_writer:
            found = [newest_checkpoint(self.job.run_directory, self.files.notice)]
        dist.broadcast_object_list(found)
        if found[0] is not None:
            trainee = self.trainee
            directory = self.job.run_directory
            state = load_checkpoint(directory, found[0], trainee.model, trainee.optimizer)
            batch_pairs = self.job.train.plan.batch_groups
            if state.global_batch_pairs != batch_pairs:
                raise ResumeError(
                    f"{directory}: its checkpoint counts {state.global_batch_pairs} pairs a step, "
                    f"this config {batch_pairs}; set global_batch_size="
                    f"{state.global_batch_pairs}, or another run_name"
                )
            trainee.scheduler.load_state_dict(state.scheduler)
            self.step = self.saved_step = state.step
            if self.files.is_writer:
                self.window.sums += torch.tensor(state.sums, dtype=torch.float64).to(
                    self.job.device
                )
            self.window.steps = state.logged_steps
        dropped = self.files.rewind(self.step if found[0] is not None else -1)
        for line in read_metrics(Path(self.job.run_directory)):
            self.latest |= line
        if self.step:
            self.files.notice(
                f"resumed at step {self.step} of {self.n_steps}"
                + (f"; {dropped} logged steps after it are done again" if dropped else "")
            )

    def settle_attention(self) -> None:
        """Decide between packed and padded rows, and say which."""
        job, model = self.job, self.trainee.model
        bf16 = use_bf16(job.config, job.device)
        settle_attention(model, job.train, job.device, bf16, self.files.notice)
        self.files.notice(f"attention: {model.attention}; {self.n_steps} steps")

    def run(self) -> None:
        """All steps from here to the end."""
        if self.step == 0 and self.job.evals:
            self._log({"step": 0, "epoch": 0.0} | self._evaluate())
        batches = self.job.train.batches(self.step, self.n_steps)
        started = time.perf_counter()
        for batch in batches:
            if batch.step != self.step:
                raise AssertionError(f"the feed gave step {batch.step}, not {self.step}")
            rate = self.trainee.scheduler.get_last_lr()[0]
            self.window.norm = train_step(self.trainee, batch, self.window.sums)
            self.step += 1
            self._count(batch, time.perf_counter() - started)
            self._after_step(rate)
            started = time.perf_counter()

    def finish(self) -> None:
        """Save the last step and write `final/`, unless an earlier attempt did."""
        job = self.job
        if self.saved_step != self.step:
            self._save()
        final = Path(job.run_directory, FINAL)
        done = [exported_step(str(final)) == self.step]
        dist.broadcast_object_list(done)
        if done[0]:
            return
        export_model(str(final), self.trainee.model, job.model, job.config.model, self.step)
        if self.files.is_writer:
            figures = summary(Path(job.run_directory))["after"]
            write_model_card(str(final), job.config, figures, dict(job.data_report), job.version)

    def _count(self, batch: StepBatch, seconds: float) -> None:
        window = self.window
        window.steps += 1
        window.seconds += seconds
        window.tokens += batch.n_tokens
        window.pairs += batch.n_pairs

    def _after_step(self, rate: float) -> None:
        """Log, evaluate and save, whichever is due."""
        config = self.job.config.train
        last = self.step == self.n_steps
        line: dict[str, Any] = {}
        if last or self.step % config.logging_steps == 0:
            line |= self._window_metrics(rate)
        if last or (config.eval_steps and self.step % config.eval_steps == 0):
            line |= self._evaluate()
        if line:
            epoch = self.step / self.job.train.steps_per_epoch
            self._log({"step": self.step, "epoch": epoch} | line)
        if last or self.step % config.save_steps == 0:
            self._save()
        elif any(name.startswith("eval_") for name in line):
            self.job.report(self.latest | {"step": self.step}, None)

    def _window_metrics(self, rate: float) -> dict[str, Any]:
        """The metrics since the last logged step: one collective, one wait for the device."""
        window, self.window = self.window, _Window(self._no_sums())
        dist.all_reduce(window.sums)
        return metrics_from_sums(window.sums.tolist(), self.weights) | {
            "learning_rate": rate,
            "grad_norm": float(window.norm) if window.norm is not None else None,
            "pairs_per_s": window.pairs / window.seconds,
            "tokens_per_s": window.tokens / window.seconds,
        }

    def _evaluate(self) -> dict[str, Any]:
        job = self.job
        return evaluate_streams(self.trainee.model, job.evals, job.config.orpo.beta, job.device)

    def _log(self, line: dict[str, Any]) -> None:
        self.latest |= line
        self.files.metrics(line)

    def _save(self) -> None:
        """Commit a checkpoint and report it."""
        # Rank 0 takes over the sums of all, here and after a resume alike: the same additions
        # in the same order, so the figures of a resumed run equal an uninterrupted one's.
        sums = self.window.sums
        dist.all_reduce(sums)
        state = TrainState(
            step=self.step,
            global_batch_pairs=self.job.train.plan.batch_groups,
            scheduler=self.trainee.scheduler.state_dict(),
            sums=tuple(sums.tolist()),
            logged_steps=self.window.steps,
        )
        if not self.files.is_writer:
            sums.zero_()
        directory = self.job.run_directory
        name = save_checkpoint(directory, self.trainee.model, self.trainee.optimizer, state)
        self.saved_step = self.step
        self.job.report(self.latest | {"step": self.step}, name)
