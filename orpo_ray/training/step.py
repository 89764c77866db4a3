"""One optimizer step over packed rows; in training workers."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from orpo_ray.dataset.packing import PackedRow
from orpo_ray.dataset.stream import StepBatch
from orpo_ray.models.microbatch import Microbatch
from orpo_ray.models.orpo_model import OrpoModel, OrpoOutput
from orpo_ray.objective.head import LossScale
from orpo_ray.objective.objectives import Objective
from orpo_ray.preference.groups import RowId
from orpo_ray.training.errors import MicrobatchTooLargeError, NonFiniteError
from orpo_ray.training.metrics import PairMargins


@dataclass(frozen=True)
class TrainState:
    """What a training step updates, and the constants it needs."""

    model: OrpoModel
    optimizer: torch.optim.Optimizer
    scheduler: Any
    objective: Objective
    max_grad_norm: float
    seed: int
    device: torch.device


@dataclass(frozen=True)
class StepResult:
    """Results of a step, on the device.

    Args:
        norm: gradient norm over all ranks before clipping.
        margins: of this rank's pairs, before the update.
        optimizer_s: host time of the update in seconds; a GPU may still be running it.
    """

    norm: Tensor
    margins: list[PairMargins]
    optimizer_s: float


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of torch's generators for one step of one rank, the same in every Python."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


def loss_scale(batch: StepBatch, objective: Objective) -> LossScale:
    """The divisors of a global batch, times the world size, since FSDP averages gradients."""
    world_size = dist.get_world_size()
    return LossScale(world_size / batch.n_nll_tokens, world_size / batch.n_pairs, objective)


def train_step(state: TrainState, batch: StepBatch, sums: Tensor) -> StepResult:
    """Update the weights with one global batch and add its metrics to `sums`.

    Args:
        state: model, optimizer and schedule.
        batch: this rank's share.
        sums: (12,) of `batch_sums`; added to in place.

    Raises:
        NonFiniteError: on all ranks; nothing was changed.
    """
    # The generator's state is a function of the step, so there is none to save.
    torch.manual_seed(step_seed(state.seed, batch.step, dist.get_rank()))
    scale = loss_scale(batch, state.objective)
    step_sums = torch.zeros_like(sums)
    if not state.model.training:
        state.model.train()
    state.optimizer.zero_grad(set_to_none=True)
    margins: list[PairMargins] = []
    for row in batch.rows:
        output = forward_backward(state, row, scale)
        step_sums += output.sums
        margins.append((row.row_ids, output.chosen_log_probs - output.rejected_log_probs))
    norm = gradient_norm(state.model)
    is_finite = _OnHost(norm.isfinite())
    # AdamW is queued before the host waits for the norm, the one wait for the device in a step.
    is_adamw = isinstance(state.optimizer, torch.optim.AdamW)
    if not is_adamw and not is_finite:
        raise _non_finite(state, batch, scale)
    started = time.perf_counter()
    if is_adamw:
        adamw_step(state.optimizer, norm, state.max_grad_norm)
    else:
        if state.max_grad_norm:
            clip_grads_with_norm_(state.model.parameters(), state.max_grad_norm, norm)
        state.optimizer.step()
    optimizer_s = time.perf_counter() - started
    if not is_finite:
        raise _non_finite(state, batch, scale)
    state.scheduler.step()
    sums += step_sums
    return StepResult(norm, margins, optimizer_s)


class _OnHost:
    """A flag of the device on its way to the host, which what is queued after it does not delay.

    Args:
        flag: a scalar of booleans.
    """

    def __init__(self, flag: Tensor) -> None:
        self._value = flag.to("cpu", non_blocking=True)  # into pinned memory
        self._copied = torch.cuda.Event() if flag.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def __bool__(self) -> bool:
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._value)


def forward_backward(state: TrainState, row: PackedRow, scale: LossScale) -> OrpoOutput:
    """Forward and backward pass of one microbatch.

    Raises:
        MicrobatchTooLargeError: when it runs out of memory.
    """
    try:
        output: OrpoOutput = state.model(Microbatch(row, state.device), scale)
        output.loss.backward()
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        n_tokens = len(row.token_ids)
        raise MicrobatchTooLargeError(
            f"a microbatch of {n_tokens} tokens does not fit into memory; set "
            f"max_tokens_per_microbatch={n_tokens // 2} or less, or gradient_checkpointing=true"
        ) from error
    return output


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed; only torch's CUDA allocator has an exception class for it."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        text in str(error)
        for text in ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")
    )


def gradient_norm(model: OrpoModel) -> Tensor:
    """The norm of the gradients over all ranks, a scalar on the device."""
    norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def adamw_step(optimizer: Any, norm: Tensor, max_norm: float) -> None:
    """Update with gradients clipped to `max_norm` (0: no clipping), if their norm is finite.

    Both in AdamW's fused kernel, by the attributes that torch's `GradScaler` sets: it divides
    gradients by the one, and moves nothing where the other is 1.
    """
    optimizer.found_inf = (~norm.isfinite()).float()
    if max_norm:
        # The inverse of `clip_grad_norm_`'s factor; the kernel reads fp32.
        optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1.0).float()
    optimizer.step()
    optimizer.found_inf = optimizer.grad_scale = None


def _non_finite(state: TrainState, batch: StepBatch, scale: LossScale) -> NonFiniteError:
    """Rerun the step's forward passes to find pairs whose log-probabilities are not finite."""
    bad: list[RowId] = []
    with torch.no_grad():
        for row in batch.rows:
            output = state.model(Microbatch(row, state.device), scale)
            log_probs = output.chosen_log_probs + output.rejected_log_probs
            bad += [
                row_id
                for row_id, fine in zip(row.row_ids, log_probs.isfinite().tolist(), strict=True)
                if not fine
            ]
    everywhere: list[list[RowId]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everywhere, bad)
    named = [row_id for part in everywhere for row_id in part] or list(batch.row_ids)
    rows = ", ".join(f"{row_id.source}:{row_id.row + 1}" for row_id in named[:16])
    text = (
        f"step {batch.step + 1}: the gradient is not finite; weights are as before it. "
        f"Rows (source:row) {rows}{' ...' if len(named) > 16 else ''}"
    )
    return NonFiniteError(text, named)
