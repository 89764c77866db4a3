"""The training loop of one worker: restore, step, log, evaluate, save, export.

It needs a process group but not Ray: batches come from an iterator and metrics are reported to a
function, so it runs under torchrun as well.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from orpo_ray.dataset.stream import StepBatch
from orpo_ray.models.build import build_model, use_bf16
from orpo_ray.models.packing_check import check_packing
from orpo_ray.models.quantized import quantized_text
from orpo_ray.objective.metrics import LossWeights
from orpo_ray.objective.objectives import objective_of
from orpo_ray.preference.groups import RowId
from orpo_ray.runs.files import (
    FINISH,
    REQUESTS,
    STOP,
    WRITTEN_BY_WORKERS,
    RunFiles,
    read_metrics,
    summary,
)
from orpo_ray.runs.resume import decisive_settings
from orpo_ray.runs.statistics import Scores, estimates
from orpo_ray.storage.folder import Folder, light
from orpo_ray.training.budget import with_head_chunk, with_token_budget
from orpo_ray.training.checkpoint.best import write_final
from orpo_ray.training.checkpoint.evaluations import Evaluations
from orpo_ray.training.checkpoint.saver import Progress
from orpo_ray.training.checkpoint.schedule import CheckpointSchedule, Snapshot
from orpo_ray.training.errors import NonFiniteError, NotSavedError, StoppedError
from orpo_ray.training.evaluation import evaluate_streams
from orpo_ray.training.flops import MfuMeter, long_step_text
from orpo_ray.training.job import TrainingJob
from orpo_ray.training.metrics import MarginLog, StepLog
from orpo_ray.training.optimizer import build_optimizer, build_scheduler, move_to_step
from orpo_ray.training.samples import Sampler
from orpo_ray.training.step import StepResult, TrainState, train_step


def run_training(job: TrainingJob) -> dict[str, dict[str, float]]:
    """Train to the last step, resuming from the newest checkpoint if there is one, and export.

    Returns:
        `summary` of the run directory.

    Raises:
        EvaluationError: when the best evaluation is needed but there is none with its metric.
        NonFiniteError: before an update that would not be finite.
        NotSavedError: when the run stopped on request, and the checkpoint could not be saved.
        ResumeError: when the checkpoint was made with other settings or data.
        StoppedError: when the run stopped on request, after saving a checkpoint.
    """
    if job.config.train.full_determinism:
        # cuBLAS reads it on first use, which is after the model is built.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    run = Folder.at(job.run_directory)
    with _files_in_step(run):
        loop = _Loop(job, run)
        loop.plan_microbatches()  # before restoring: a resumed run has to decide the same
        loop.restore()
        loop.run()
        loop.finish()
        run.forget_heavy()
    return summary(run.path)


@contextmanager
def _files_in_step(run: Folder) -> Iterator[None]:
    """Keep a run directory in a bucket in sync with the driver's, on rank 0."""
    if dist.get_rank():
        yield
        return
    run.fetch(light).make()
    written, asked = frozenset(WRITTEN_BY_WORKERS), frozenset({STOP, FINISH, REQUESTS})
    with run.kept_in_step(written.__contains__, asked.__contains__):
        yield


@dataclass
class _Loop:
    job: TrainingJob
    folder: Folder
    step: int = 0
    skipped_rows: int = 0

    def __post_init__(self) -> None:
        config = self.job.config.with_intervals(self.job.train.steps_per_epoch)
        self.job = job = replace(self.job, config=config)
        self.evaluations = Evaluations.from_config(config.train, list(job.evals))
        self.files = RunFiles(self.folder, is_writer=dist.get_rank() == 0)
        self.n_steps = config.total_steps(job.train.steps_per_epoch)
        model = build_model(config, job.model.model, job.device)
        optimizer = build_optimizer(model, config.train)
        self.state = TrainState(
            model=model,
            optimizer=optimizer,
            scheduler=build_scheduler(optimizer, config.train, self.n_steps),
            objective=objective_of(config.orpo),
            max_grad_norm=config.train.max_grad_norm,
            seed=config.train.seed,
            device=job.device,
        )
        weights = LossWeights(self.state.objective, model.router_coef)
        mfu_meter = None
        if job.device.type == "cuda":
            dtype = torch.bfloat16 if use_bf16(config, job.device) else torch.float32
            mfu_meter = MfuMeter(model.causal_lm, job.device, dtype)
        self.log = StepLog(self.files, weights, job.device, job.watch, mfu_meter)
        self.margins = MarginLog(self.files)
        self.sampler = Sampler.from_job(job, model, self.files)
        settings = decisive_settings(config, job.train.data_digest)
        self.schedule = CheckpointSchedule(
            config, settings, self.files, self.state, self.evaluations, job.preemption_notice
        )

    def restore(self) -> None:
        """Resume from the newest valid checkpoint."""
        progress = self.schedule.restore()
        if progress is not None:
            move_to_step(self.state.scheduler, progress.step)
            self.step, self.skipped_rows = progress.step, progress.skipped_rows
            self.log.restore(progress.sums, progress.logged_steps)
        redone = self.files.rewind(self.step if progress is not None else -1)
        lines = read_metrics(self.folder.path)
        for line in lines:
            self.log.remember(line)
        self.evaluations.restore(lines)
        self._check_patience()
        if progress is None and not redone:
            return
        text = f"resumed at step {self.step} of {self.n_steps}"
        if redone:
            text += f"; {redone} steps after it are done again"
        if redone or self.step < self.n_steps:
            self.files.event(text, resumed=1, steps_redone=redone)
        else:
            self.files.notice(text)

    def plan_microbatches(self) -> None:
        """Choose packed or padded rows and their token budget, and log the choice."""
        model = self.state.model
        self.job = job = with_head_chunk(self.job, model)
        bf16 = use_bf16(job.config, job.device)
        if job.config.model.load_in_4bit:
            self.files.notice(quantized_text(model))
        check_packing(model, job.train, job.device, bf16, self.files.notice)
        fused = "; Liger's kernels" if model.has_liger else ""
        if model.is_compiled:
            fused += "; layers are compiled in the first step, unless torch_compile=false is set"
        self.files.notice(f"attention: {model.attention_text}{fused}; {self.n_steps} steps")
        self.job = with_token_budget(job, self.state, self.files.notice)

    def run(self) -> None:
        """Run all remaining steps."""
        if self.step < self.n_steps and self.schedule.asked_to_stop():
            self._stop()
        if self.step == 0 and (evaluated := self._evaluate()):
            self.log.write({"step": 0, "epoch": 0.0} | evaluated)
        batches = self.job.train.batches(self.step, self.n_steps)
        first_step = self.step
        started = time.perf_counter()
        for batch in batches:
            self.log.add_time("data_wait", time.perf_counter() - started)
            if batch.step != self.step:
                raise AssertionError(f"the feed gave step {batch.step}, not {self.step}")
            if self.step == first_step:
                self._say_how_long(batch)
            rate = float(self.state.scheduler.get_last_lr()[0])
            self._step(batch, started)
            self._after_step(rate)
            if self.step == self.n_steps:
                break  # early stopping may have lowered n_steps
            started = time.perf_counter()

    def _say_how_long(self, batch: StepBatch) -> None:
        """Before a step that takes long, that it does."""
        job, causal_lm = self.job, self.state.model.causal_lm
        dtype = torch.bfloat16 if use_bf16(job.config, job.device) else torch.float32
        if dist.get_rank() == 0 and batch.rows:
            text = long_step_text(causal_lm, batch.rows, job.device, dtype)
            if text is not None:
                self.files.notice(text)

    def _step(self, batch: StepBatch, asked_at: float) -> None:
        """Train on a batch that was requested at `asked_at`, and record its rows."""
        left_out: tuple[RowId, ...] = ()
        result: StepResult | None = None
        started = time.perf_counter()
        while batch.n_pairs and result is None:
            try:
                result = train_step(self.state, batch, self.log.sums)
            except NonFiniteError as error:
                self._check_nonfinite(error)
                left_out += error.rows
                batch = self.job.train.batch_without(batch.step, set(left_out))
        if result is None:
            self.state.scheduler.step()  # nothing is left to train on in this step
        ended = time.perf_counter()
        optimizer_s = result.optimizer_s if result else 0.0
        self.log.add_time("optimizer", optimizer_s)
        self.log.add_time("forward_backward", ended - started - optimizer_s)
        self.log.add(batch, result.norm if result else None, ended - asked_at)
        self.step += 1
        self.files.ledger(self.step, batch.epoch, batch.row_ids, left_out)
        if self.state.objective.terms is not None:
            self.margins.add(self.step, batch.row_ids, result.margins if result else [])

    def _check_nonfinite(self, error: NonFiniteError) -> None:
        """Record the rows that are left out.

        Raises:
            NonFiniteError: with on_nonfinite=stop, or beyond max_skipped_rows.
        """
        train = self.job.config.train
        self.skipped_rows += len(error.rows)
        if train.on_nonfinite == "stop":
            raise error
        if self.skipped_rows > train.max_skipped_rows:
            raise NonFiniteError(
                f"{error}; {self.skipped_rows} rows were to be left out, more than "
                f"max_skipped_rows={train.max_skipped_rows}",
                error.rows,
            ) from error
        self.files.event(f"{error}; left out", rows_skipped=len(error.rows))

    def finish(self) -> None:
        """Save the last checkpoint and write `final/`."""
        self._save(last=True)
        write_final(self.job, self.state.model, self.evaluations, self.files, self.step)

    def _after_step(self, rate: float) -> None:
        """Log, evaluate and save if due."""
        config = self.job.config.train
        evaluated: dict[str, Any] = {}
        if self._is_due(config.eval_steps) or self.schedule.evaluates:
            self.schedule.evaluates = False
            evaluated = self._evaluate()
            self._check_patience()
        last = self.step == self.n_steps
        line: dict[str, Any] = {}
        if self._is_due(config.logging_steps) or (self.step == 1 and config.logging_first_step):
            self.margins.flush()
            line |= self.log.read(rate)
            self.log.check_spike(self.step, line["loss"])
        line |= evaluated
        if line:
            epoch = self.step / self.job.train.steps_per_epoch
            self.log.write({"step": self.step, "epoch": epoch} | line)
        if evaluated:
            self.job.report(self.log.latest | {"step": self.step})
        with self.log.timed("checkpoint"):
            self._save(last)
        if self.schedule.stops and not last:
            self._stop()
        if self.schedule.finishes and self.step + 1 < self.n_steps:
            self.n_steps = self.step + 1
            self.files.notice(f"ends after step {self.n_steps}, as asked to")

    def _is_due(self, every: Any) -> bool:
        """Whether what is done every so many steps is due; at the last one everything is."""
        return self.step == self.n_steps or (every is not None and self.step % every == 0)

    def _stop(self) -> NoReturn:
        """End here, as the run was asked to.

        Raises:
            StoppedError: if nothing is lost.
            NotSavedError: if no checkpoint has this step.
        """
        text = f"stopped at step {self.step} of {self.n_steps}"
        saved = self.schedule.saved_step
        if saved == self.step or self.step == 0:
            self.files.notice(f"{text}, as asked to")
            raise StoppedError(text)
        start = "from the beginning" if saved < 0 else f"from step {saved}"
        raise NotSavedError(
            f"{text}, and its checkpoint was not saved: {self.schedule.problem}; "
            f"the same command with the same run_name goes on {start}"
        )

    def _evaluate(self) -> dict[str, Any]:
        """Evaluate all sets and answer the sample prompts."""
        job, model = self.job, self.state.model
        with self.log.timed("evaluation"):
            found = evaluate_streams(model, job.evals, self.state.objective, job.device)
            self.evaluations.add(self.step, found.metrics)
            for prefix, table in found.scores.items():
                if not len(table):
                    continue  # no pair has two answers
                figures = estimates(Scores.from_table(table))
                shown = {name: astuple(figure) for name, figure in figures.items()}
                self.files.evaluation(self.step, prefix, len(table), shown)
        if self.sampler is not None:
            with self.log.timed("samples"):
                answers = self.sampler.answer(model, job.device)
                for prompt, answer in zip(self.sampler.prompts, answers, strict=True):
                    self.files.sample(self.step, prompt.text, answer, prompt.chosen)
        more = self.job.compute_metrics(found.scores) if found.scores else {}
        return found.metrics | dict(more)

    def _check_patience(self) -> None:
        """Make this step the last one if early_stopping_patience is exceeded."""
        if self.step < self.n_steps and self.evaluations.patience_is_out:
            self.n_steps = self.step
            self.files.notice(self.evaluations.stop_text(self.step))

    def _save(self, last: bool) -> None:
        """Save a checkpoint if it is due."""
        if self.schedule.is_due(self.step, last):
            self.schedule.save(self._snapshot())

    def _snapshot(self) -> Snapshot:
        """What a checkpoint of this step holds besides tensors; a collective.

        Every rank's own sums are kept, so a save changes nothing: wherever the saves of a run
        fall, the same numbers are added up in the same order.
        """
        self.margins.flush()
        stream = self.job.train
        sums = [torch.zeros_like(self.log.sums) for _ in range(dist.get_world_size())]
        dist.all_gather(sums, self.log.sums)
        progress = Progress(
            step=self.step,
            global_batch_pairs=stream.plan.batch_groups,
            sums=tuple(tuple(part.tolist()) for part in sums),
            logged_steps=self.log.steps,
            skipped_rows=self.skipped_rows,
        )
        return Snapshot(progress, stream.position(self.step))
