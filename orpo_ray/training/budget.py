"""The token budget of a microbatch, by measurement on the GPU; in training workers."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.dataset.packing import pack
from orpo_ray.dataset.stream import TokenStream
from orpo_ray.models.orpo_model import OrpoModel
from orpo_ray.objective.head import LossScale
from orpo_ray.preference.groups import PromptGroup
from orpo_ray.training.job import TrainingJob
from orpo_ray.training.optimizers.memory import is_whole_everywhere, state_bytes
from orpo_ray.training.step import TrainState, forward_backward

_GIB = 2**30
_N_CANDIDATES = 256  # first groups, of which the longest is measured
_MARGIN = 0.1  # of the device, for what the allocator cannot use and what was not measured
_SIGNIFICANT_BITS = 5


@dataclass(frozen=True)
class Measured:
    """Peak memory of a microbatch, including weights and gradients."""

    n_tokens: int
    peak_bytes: int


def head_chunk(config: ORPOConfig, model: OrpoModel, device: torch.device) -> int:
    """Number of positions that the LM head projects at once on a device."""
    vocab_size = model.causal_lm.config.get_text_config().vocab_size
    return config.train.head_chunk(vocab_size, device.type == "cuda")


def with_head_chunk(job: TrainingJob, model: OrpoModel) -> TrainingJob:
    """The job with the head chunk of its device, which was unknown when the feed was planned."""
    chunk_tokens = head_chunk(job.config, model, job.device)
    if chunk_tokens == job.config.train.head_chunk():
        return job
    return _with_plan(job, chunk_tokens=chunk_tokens)


def with_token_budget(
    job: TrainingJob, state: TrainState, notice: Callable[[str], None]
) -> TrainingJob:
    """The job with its token budget, measured with `max_tokens_per_microbatch=auto`.

    Batches and their order do not depend on the budget. It is the same on all ranks and in every
    run on the same devices: it is measured before a checkpoint is loaded, and the memory that the
    optimizer will need is added.

    Args:
        job: of this rank; every rank calls this.
        state: before the first step. Weights are kept, gradients dropped.
        notice: receives a line with the result.

    Raises:
        MicrobatchTooLargeError: when one of the longest groups does not fit.
    """
    if job.config.train.max_tokens_per_microbatch != "auto":
        return job
    if job.device.type != "cuda":
        notice(
            "max_tokens_per_microbatch: auto measures GPUs only; here it is "
            f"{job.train.plan.budget_tokens} tokens, as unset"
        )
        return job
    budget, text = _measured_budget(job.train, state, job.config.train.optim)
    notice(f"max_tokens_per_microbatch: auto is {budget} tokens; {text}")
    return _with_plan(job, budget_tokens=budget)


def with_plan(stream: TokenStream, **changes: Any) -> TokenStream:
    """The same batches with another size of microbatches or chunks."""
    return dataclasses.replace(stream, plan=dataclasses.replace(stream.plan, **changes))


def _with_plan(job: TrainingJob, **changes: Any) -> TrainingJob:
    evals = {prefix: with_plan(stream, **changes) for prefix, stream in job.evals.items()}
    return dataclasses.replace(job, train=with_plan(job.train, **changes), evals=evals)


def tokens_that_fit(measured: Sequence[Measured], later_bytes: int, room_bytes: int) -> int:
    """Number of tokens that fit, by linear extrapolation from the last measurement.

    The slope is the steepest between two neighbouring measurements. If memory does not grow with
    tokens, the result is larger than any batch.

    Args:
        measured: at least two measurements, by ascending tokens.
        later_bytes: memory that is allocated at the first update.
        room_bytes: available memory.
    """
    steps = pairwise(measured)
    slope = max((b.peak_bytes - a.peak_bytes) / (b.n_tokens - a.n_tokens) for a, b in steps)
    last = measured[-1]
    left = room_bytes - later_bytes - last.peak_bytes
    if slope <= 0:
        return 1 << 40 if left >= 0 else 1
    return max(1, last.n_tokens + int(left // slope))


def rounded_down(n_tokens: int) -> int:
    """Round to five significant bits, so that a slightly different measurement gives the same."""
    step: int = 1 << max(0, n_tokens.bit_length() - _SIGNIFICANT_BITS)
    return n_tokens - n_tokens % step


def optimizer_bytes(model: nn.Module, optim: str = "adamw") -> int:
    """Memory of an optimizer's state on this rank's GPU, allocated in the first step.

    Args:
        model: with its shards of this rank.
        optim: the setting.
    """
    found = 0.0
    for parameter in model.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if parameter.requires_grad and local.is_cuda:
            share = 1.0 if is_whole_everywhere(optim) else local.numel() / parameter.numel()
            found += share * state_bytes(optim, parameter.shape)
    return math.ceil(found)


def agreed(n_tokens: int, device: torch.device) -> int:
    """The minimum over all ranks."""
    fewest = torch.tensor(n_tokens, dtype=torch.int64, device=device)
    dist.all_reduce(fewest, op=dist.ReduceOp.MIN)
    return int(fewest.item())


def _measured_budget(stream: TokenStream, state: TrainState, optim: str) -> tuple[int, str]:
    """The budget, and a text with its measurements.

    Rows of one and two head chunks give a first estimate (shorter rows have fewer logits than a
    chunk); a row of half of it gives a better one.
    """
    group = max(stream.first_groups(_N_CANDIDATES), key=lambda group: group.n_tokens)
    most = -(-stream.plan.batch_groups // stream.world_size) * group.n_tokens
    later, device = optimizer_bytes(state.model, optim), state.device
    chunk = -(-stream.plan.chunk_tokens // group.n_tokens)
    measured = [_measure(state, stream, [group] * n) for n in (chunk, 2 * chunk)]
    room = _room_bytes(device)
    fitting = agreed(tokens_that_fit(measured, later, room), device)
    n_groups = min(fitting, most) // 2 // group.n_tokens
    if n_groups > 2 * chunk:
        measured.append(_measure(state, stream, [group] * n_groups))
        fitting = agreed(tokens_that_fit(measured, later, room), device)
    state.model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    taken = ", ".join(f"{m.peak_bytes / _GIB:.2f} for {m.n_tokens} tokens" for m in measured)
    text = (
        f"GiB measured: {taken}; {later / _GIB:.2f} for the optimizer come later, "
        f"{room / _GIB:.2f} may be used"
    )
    return rounded_down(fitting) if fitting < most else most, text


def _measure(state: TrainState, stream: TokenStream, groups: list[PromptGroup]) -> Measured:
    """Measure forward and backward of one row while gradients are accumulated."""
    row = pack(groups, stream.plan.chunk_tokens, stream.plan.prompt_counts)
    state.model.train()
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats(state.device)
        forward_backward(state, row, LossScale(nll=0.0, pair=0.0, objective=state.objective))
    return Measured(len(row.token_ids), torch.cuda.max_memory_allocated(state.device))


def _room_bytes(device: torch.device) -> int:
    """Memory that this process may use: reserved and free memory less the margin."""
    free, total = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - _MARGIN * total)
