"""The budget of a microbatch: what is made of measurements, and that it changes no batch."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.models.build import build_model
from orpo_ray.objective.objectives import orpo
from orpo_ray.pretrained import ModelSource
from orpo_ray.training.budget import (
    Measured,
    agreed,
    optimizer_bytes,
    rounded_down,
    tokens_that_fit,
    with_plan,
    with_token_budget,
)
from orpo_ray.training.job import TrainingJob
from orpo_ray.training.optimizer import build_optimizer, build_scheduler
from orpo_ray.training.step import TrainState
from tests.reference.small_run import metrics_without_times, token_stream, train_small


def test_tokens_by_a_straight_line():
    """1000 + 2 a token: of 9000, 500 are kept for later, so (9000 - 500 - 1000) / 2 = 3750."""
    line = [Measured(100, 1200), Measured(200, 1400), Measured(1000, 3000)]
    assert tokens_that_fit(line, later_bytes=500, room_bytes=9000) == 3750


def test_tokens_by_the_steepest_stretch_of_a_bent_line():
    """The slopes are 2 and 3: from 3800 at 1000 on, (9800 - 3800) / 3 = 2000 more."""
    bent = [Measured(100, 1200), Measured(200, 1400), Measured(1000, 3800)]
    assert tokens_that_fit(bent, later_bytes=0, room_bytes=9800) == 3000


def test_tokens_when_there_is_no_room_or_no_growth():
    flat = [Measured(100, 1200), Measured(200, 1200)]
    assert tokens_that_fit(flat, later_bytes=0, room_bytes=1000) == 1
    assert tokens_that_fit(flat, later_bytes=0, room_bytes=2000) >= 2**40
    steep = [Measured(100, 1200), Measured(200, 1400)]
    assert tokens_that_fit(steep, later_bytes=1000, room_bytes=1100) == 1


def test_five_bits_are_kept():
    """3750 is 111010100110 in binary, 3712 its first five bits; less than 32 stays as it is."""
    assert rounded_down(3750) == 0b111010000000 == 3712
    assert rounded_down(31) == 31
    assert rounded_down(1) == 1


@pytest.mark.parametrize(
    ("vocab_size", "on_gpu", "expected"),
    [
        (128_000, False, 1024),
        (32_000, True, 4096),
        (128_000, True, 2097),  # 2**28 logits are 1 GiB in fp32
        (1_000_000, True, 1024),
    ],
)
def test_the_heads_chunks_are_longer_on_gpus(vocab_size, on_gpu, expected):
    assert ORPOConfig().train.head_chunk(vocab_size, on_gpu) == expected
    asked = ORPOConfig(head_chunk_tokens=77)
    assert asked.train.head_chunk(vocab_size, on_gpu) == 77


def fewest() -> int:
    return agreed([70, 50][dist.get_rank()], torch.device("cpu"))


def test_all_ranks_take_the_fewest_tokens_of_any(run_ranks):
    assert run_ranks(2, fewest) == [50, 50]


def test_the_budget_changes_no_batch(inputs):
    """The same pairs and counts a step, in other microbatches, as many on both ranks."""
    streams = [token_stream(inputs, rank, 2) for rank in range(2)]
    cut = {
        budget: [list(with_plan(stream, budget_tokens=budget).batches(0, 12)) for stream in streams]
        for budget in (40, 400)
    }
    for one, other in itertools.product(cut[40], cut[400]):
        for a, b in zip(one, other, strict=True):
            assert (a.row_ids, a.n_pairs, a.n_nll_tokens) == (b.row_ids, b.n_pairs, b.n_nll_tokens)
    for first, second in cut.values():
        assert [len(b.rows) for b in first] == [len(b.rows) for b in second]
    assert len(cut[40][0][0].rows) > len(cut[400][0][0].rows) == 1


def test_auto_is_as_unset_without_a_gpu(run_ranks, inputs, whole_run, tmp_path):
    changes = {"max_tokens_per_microbatch": "auto", "evaluate": False, "max_steps": 5}
    run_ranks(1, train_small, inputs, tmp_path, changes)
    log = (tmp_path / "run.log").read_text()
    assert "max_tokens_per_microbatch: auto measures GPUs only; here it is 60 tokens" in log
    assert [line["step"] for line in metrics_without_times(tmp_path)] == [5]


def test_the_budget_is_unset_until_it_is_measured():
    config = ORPOConfig(
        max_tokens_per_microbatch="auto", per_device_train_batch_size=3, max_length=100
    )
    assert config.microbatch_tokens == 300


def measured_on_a_gpu(folder: Path, run: Path) -> tuple[int, int, str]:
    """The budget that is measured, bytes of the optimizer as foretold, and what is said."""
    device = torch.device("cuda")
    config = ORPOConfig(max_tokens_per_microbatch="auto", global_batch_size=2000)
    model = build_model(config, str(folder / "model"), device)
    optimizer = build_optimizer(model, config.train)
    state = TrainState(
        model, optimizer, build_scheduler(optimizer, config.train, 1), orpo(0.1), 1, 0, device
    )
    source = ModelSource(str(folder / "model"), str(folder / "model"))
    stream = token_stream(folder, 0, 1, batch_groups=2000)
    job = TrainingJob(config, source, str(run), stream, {}, device, lambda metrics: None)
    said: list[str] = []
    budgets = [
        with_token_budget(job, state, said.append).train.plan.budget_tokens for _ in range(2)
    ]
    assert budgets[0] == budgets[1]
    return budgets[0], optimizer_bytes(model), said[0]


@pytest.mark.needs_gpu
def test_a_gpu_is_measured(run_ranks, inputs, tmp_path):
    """It holds more than the few tokens that were tried; AdamW keeps 8 bytes of a parameter."""
    ((budget, later, said),) = run_ranks(1, measured_on_a_gpu, inputs, tmp_path, backend="nccl")
    # Tied embeddings 96 x 32, two layers: q and o 32 x 32, k and v 16 x 32, three of 32 x 64,
    # two norms; and the last norm.
    n_parameters = 96 * 32 + 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    assert later == 8 * n_parameters
    assert budget > 1000
    assert said.startswith(f"max_tokens_per_microbatch: auto is {budget} tokens; GiB measured: ")
