"""Memory and checkpoints: `memory.py budget SIZE | saving SIZE | long SIZE`."""

import sys
import time

import numpy as np
import torch
import torch.distributed as dist

from orpo_ray.dataset.packing import PackedRow, pack
from orpo_ray.dataset.stream import StepBatch
from orpo_ray.preference.groups import PromptGroup, RowId
from orpo_ray.pretrained import ModelSource
from orpo_ray.storage.folder import Folder
from orpo_ray.training.budget import with_token_budget
from orpo_ray.training.checkpoint.saver import CheckpointSaver, Progress
from orpo_ray.training.job import TrainingJob
from orpo_ray.training.step import TrainState
from rank import N_PAIRS, built, folder_of, losses, start_rank, stream
from results import CUDA, DRY, attempt, peak_gib, record, seconds_left, wait


def budget(size: str) -> None:
    """What `max_tokens_per_microbatch=auto` finds, and whether steps of such rows fit."""
    folder = folder_of(size)
    state, config = built(folder, max_tokens_per_microbatch="auto", global_batch_size=N_PAIRS)
    source = ModelSource(str(folder / "model"), str(folder / "model"))
    feed = stream(folder, N_PAIRS)
    job = TrainingJob(
        config, source, str(folder), feed, {}, state.device, report=lambda metrics: None
    )
    notices: list[str] = []
    started = time.perf_counter()
    settled = with_token_budget(job, state, notices.append)
    tokens = settled.train.plan.budget_tokens
    record(
        "budget", size=size, tokens=tokens, notices=notices, seconds=time.perf_counter() - started
    )
    group = max(feed.first_groups(256), key=lambda group: group.n_tokens)
    row = pack([group] * (1 if DRY else max(1, tokens // group.n_tokens)), 1024, True)
    with attempt("budget", size=size):
        for _ in range(2):
            losses(state, [step_of(row, row)])
        free, total = torch.cuda.mem_get_info() if CUDA else (0, 1)
        record(
            "budget",
            size=size,
            row_tokens=len(row.token_ids),
            peak_gib=peak_gib(),
            reserved_gib=torch.cuda.max_memory_reserved() / 2**30 if CUDA else 0.0,
            left_of_device=free / total,
        )


def saving(size: str) -> None:
    """How long a step waits for a checkpoint, once host memory for it is allocated beside steps."""
    folder = folder_of(size)
    state, _ = built(folder)
    batches = list(stream(folder, 4 if DRY else 32).batches(0, 4))
    losses(state, batches[:2])
    saver = CheckpointSaver(Folder.at(folder), keep=1, keeps_memory=True)
    wait()
    started = time.perf_counter()
    saver.prepare(state.model, state.optimizer)
    prepare_s = time.perf_counter() - started
    beside: list[float] = []
    while not saver.is_prepared or not beside:
        beside.append(_step_s(state, batches[2:3]))
    record(
        "saving",
        size=size,
        prepare_stalled_s=prepare_s,
        allocated_after_s=time.perf_counter() - started,
        steps_beside=len(beside),
        slowest_step_beside_s=max(beside),
        step_s=min(_step_s(state, batches[2:3]) for _ in range(3)),
    )
    for number in range(1, 4):
        if seconds_left() < 15:
            break
        wait()
        started = time.perf_counter()
        progress = Progress(number, 32, ((0.0,),), 0, 0)
        saver.start(state.model, state.optimizer, progress, {"step": number})
        stalled = time.perf_counter() - started
        started = time.perf_counter()
        step_s = _step_s(state, batches[2:3])
        problem = saver.finish()
        record(
            "saving",
            size=size,
            number=number,
            stalled_s=stalled,
            step_beside_s=step_s,
            written_after_s=time.perf_counter() - started,
            problem=problem,
        )


def _step_s(state: TrainState, batches: list[StepBatch]) -> float:
    """Seconds of steps, which read their loss back."""
    started = time.perf_counter()
    losses(state, batches)
    return time.perf_counter() - started


def long(size: str) -> None:
    """Steps of one pair of two 8 k answers at 128 k words: what its logits take."""
    length, vocabulary = (100, "16k") if DRY else (8192, "128k")
    folder = folder_of(size, vocabulary)
    state, _ = built(folder)
    numbers = np.random.default_rng(0)
    prompt, *answers = (
        numbers.integers(3, 16_000, n, dtype=np.int32) for n in (length // 8, length, length)
    )
    row = pack([PromptGroup(prompt, tuple(answers), ((0, 1),), (RowId(0, 0),))], 1024, True)
    with attempt("long", size=size):
        losses(state, [step_of(row)])
        wait()
        before = torch.cuda.memory_allocated() / 2**30 if CUDA else 0.0
        started = time.perf_counter()
        losses(state, [step_of(row)])
        wait()
        record(
            "long",
            size=size,
            row_tokens=len(row.token_ids),
            step_ms=1e3 * (time.perf_counter() - started),
            held_gib=before,
            peak_gib=peak_gib(),
        )


def step_of(*rows: PackedRow) -> StepBatch:
    """A step whose microbatches are these rows."""
    n_tokens, n_pairs = sum(r.n_nll_tokens for r in rows), sum(r.n_pairs for r in rows)
    return StepBatch(0, 0, rows, n_tokens, n_pairs, 0, ())


if __name__ == "__main__":
    start_rank()
    {"budget": budget, "saving": saving, "long": long}[sys.argv[1]](sys.argv[2])
    dist.destroy_process_group()
