"""Metrics of training steps: lines of `metrics.jsonl` and margins of pairs; in training workers."""

import contextlib
import math
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from orpo_ray.dataset.stream import StepBatch
from orpo_ray.objective.metrics import (
    N_SUMS,
    LossWeights,
    metrics_from_sums,
    sums_of_checkpoint,
)
from orpo_ray.preference.groups import RowId
from orpo_ray.runs.files import TIME_PARTS, TIME_PREFIX, RunFiles
from orpo_ray.training.flops import MfuMeter
from orpo_ray.training.job import Report

# A spike is a logged loss this many times the median of this many lines before it.
_SPIKE, _RECENT = 10.0, 50


@dataclass
class StepLog:
    """Accumulates the metrics of steps on the device and writes lines of `metrics.jsonl`.

    Args:
        files: of the run directory.
        weights: of the terms of the loss.
        device: of this rank.
        watch: called with every line that is written, on rank 0.
        mfu_meter: counts model FLOPs on GPUs; None: `mfu` is not logged.
        sums: (12,) of `batch_sums` since the last logged step, of this rank.
        steps: optimizer steps since then.
        latest: the last logged value of every metric.
    """

    files: RunFiles
    weights: LossWeights
    device: torch.device
    watch: Report
    mfu_meter: MfuMeter | None
    sums: Tensor = field(init=False)
    steps: int = 0
    latest: dict[str, Any] = field(default_factory=dict)
    _norm: Tensor | None = None
    _seconds: float = 0.0
    _tokens: int = 0
    _pairs: int = 0
    _spent: dict[str, float] = field(default_factory=dict)
    _losses: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))

    def __post_init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.sums = torch.zeros(N_SUMS, dtype=torch.float64, device=self.device)
        self.steps = self._tokens = self._pairs = 0
        self._seconds = 0.0
        self._norm = None

    def restore(self, sums: tuple[tuple[float, ...], ...], steps: int) -> None:
        """Restore the sums of a checkpoint, by rank; at another world size rank 0 gets them all."""
        now = list(map(sums_of_checkpoint, sums))
        before = torch.tensor(now, dtype=torch.float64, device=self.device)
        if len(before) == dist.get_world_size():
            self.sums += before[dist.get_rank()]
        elif dist.get_rank() == 0:
            self.sums += before.sum(0)
        self.steps = steps

    def remember(self, line: dict[str, Any]) -> None:
        """Restore from a line that was written before this worker started."""
        self.latest |= line
        if line.get("loss") is not None:
            self._losses.append(line["loss"])

    def add(self, batch: StepBatch, norm: Tensor | None, seconds: float) -> None:
        """Add a step.

        Args:
            batch: its batch.
            norm: gradient norm; None for a step without an update.
            seconds: its duration, including the wait for data.
        """
        self.steps += 1
        self._tokens += batch.n_tokens
        self._pairs += batch.n_pairs
        self._seconds += seconds
        if self.mfu_meter is not None:
            self.mfu_meter.add(batch.rows)
        self._norm = norm if norm is not None else self._norm

    def add_time(self, part: str, seconds: float) -> None:
        """Add time to one of `TIME_PARTS`."""
        self._spent[part] = self._spent.get(part, 0.0) + seconds

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time in this context to one of `TIME_PARTS`."""
        started = time.perf_counter()
        yield
        self.add_time(part, time.perf_counter() - started)

    def read(self, rate: float) -> dict[str, Any]:
        """Metrics since the last logged step: one collective, one device synchronization."""
        dist.all_reduce(self.sums)
        metrics = metrics_from_sums(self.sums.tolist(), self.weights) | {
            "learning_rate": rate,
            "grad_norm": float(self._norm) if self._norm is not None else None,
            "pairs_per_s": self._pairs / self._seconds,
            "tokens_per_s": self._tokens / self._seconds,
        }
        if self.mfu_meter is not None:
            metrics["mfu"] = self.mfu_meter.read(self._seconds)
        self._clear()
        return metrics

    def check_spike(self, step: int, loss: float) -> None:
        """Record an event if a logged loss is far above those before it."""
        median = statistics.median(self._losses) if self._losses else math.inf
        if loss > _SPIKE * median:
            text = f"step {step}: the loss is {loss:.4g}, {median:.4g} was usual before"
            self.files.event(text, loss_spikes=1)
        self._losses.append(loss)

    def write(self, line: dict[str, Any]) -> None:
        """Write a line, with the time spent on each part since the previous line."""
        self.latest |= line
        seconds = {TIME_PREFIX + part: round(self._spent.get(part, 0.0), 4) for part in TIME_PARTS}
        self._spent = {}
        self.files.metrics(line | seconds)
        if self.files.is_writer:
            self.watch(line | seconds)


PairMargins = tuple[tuple[RowId, ...], Tensor]
"""Rows of one microbatch, and their margins: log-probability of chosen minus rejected answer."""


class MarginLog:
    """Keeps margins on the device until `flush` writes them to `margins.jsonl`."""

    def __init__(self, files: RunFiles) -> None:
        self._files = files
        self._steps: list[tuple[int, tuple[RowId, ...]]] = []
        self._parts: list[tuple[int, PairMargins]] = []

    def add(self, step: int, rows: tuple[RowId, ...], margins: Sequence[PairMargins]) -> None:
        """Add a step.

        Args:
            step: optimizer steps done, this one included.
            rows: of the global batch, in the order of the ledger.
            margins: this rank's share.
        """
        self._steps.append((step, rows))
        self._parts += [(step, part) for part in margins if part[0]]

    def flush(self) -> None:
        """Write the margins of all steps since the last flush; a collective."""
        if not self._steps:
            return
        tensors = [margins for _, (_, margins) in self._parts]
        figures = torch.cat(tensors).tolist() if tensors else []
        keys = [(step, row_id) for step, (row_ids, _) in self._parts for row_id in row_ids]
        mine = list(zip(keys, figures, strict=True))
        everywhere = [mine] * dist.get_world_size() if self._files.is_writer else None
        dist.gather_object(mine, everywhere)
        if everywhere is not None:
            found: defaultdict[tuple[int, RowId], list[float]] = defaultdict(list)
            for part in everywhere:
                for key, figure in part:
                    found[key].append(figure)
            for step, rows in self._steps:
                self._files.margins(step, [found[step, row_id].pop(0) for row_id in rows])
        self._steps, self._parts = [], []
