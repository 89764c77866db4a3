"""Optimizers of little memory: what they compute, and that a resumed run has their bytes."""

import shutil
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.fsdp import fully_shard

from orpo_ray.config.schema import ConfigError, ORPOConfig
from orpo_ray.config.train import TrainSection
from orpo_ray.models.build import build_model
from orpo_ray.objective.metrics import N_SUMS
from orpo_ray.objective.objectives import orpo
from orpo_ray.storage.folder import Folder
from orpo_ray.training.checkpoint.saver import CheckpointSaver, Progress, load_checkpoint
from orpo_ray.training.errors import NonFiniteError
from orpo_ray.training.optimizer import build_optimizer, build_scheduler, move_to_step
from orpo_ray.training.optimizers.memory import block_size, state_bytes
from orpo_ray.training.step import TrainState, train_step
from tests.reference.small_run import metrics_without_times, token_stream, train_small

needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")
SMALL = ("adafactor", pytest.param("adamw_8bit", marks=needs_torchao))
RATE, DECAY = 1e-2, 0.1


def network() -> nn.Module:
    """Rows that two ranks share unevenly, and one row; moments in 8 bits, and in 32."""
    torch.manual_seed(0)
    widths = (512, 33, 192, 40, 1)
    layers = [nn.Linear(*shape) for shape in pairwise(widths)]
    return nn.Sequential(layers[0], nn.LayerNorm(33), *layers[1:])


def optimizer_of(model: nn.Module, optim: str) -> torch.optim.Optimizer:
    settings = {"learning_rate": RATE, "weight_decay": DECAY, "optim": optim}
    return build_optimizer(model, TrainSection(**settings))


def update(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Steps of random data, the same on all ranks: gradients are those of one."""
    for step in range(first, last):
        data = torch.randn(8, 512, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(data).square().mean().backward()
        optimizer.step()


def whole(model: nn.Module) -> list[torch.Tensor]:
    return [getattr(p, "full_tensor", p.detach)().detach().clone() for p in model.parameters()]


def sharded(optim: str, n_steps: int) -> list[torch.Tensor]:
    model = network()
    fully_shard(model)
    update(model, optimizer_of(model, optim), 0, n_steps)
    return whole(model)


def test_adafactor_is_that_of_transformers_and_trl(run_ranks):
    """Their Trainer's own arguments, on whole weights; no decay of vectors, as there."""
    model = network()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    theirs = transformers.Adafactor(groups, lr=RATE, scale_parameter=False, relative_step=False)
    update(model, theirs, 0, 6)
    for n_ranks in (1, 2):
        for found in run_ranks(n_ranks, sharded, "adafactor", 6):
            for ours, expected in zip(found, whole(model), strict=True):
                torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@needs_torchao
def test_moments_in_8_bits_train_nearly_as_those_in_32(run_ranks):
    """Six steps of 1e-2 move a weight by 6e-2 at most; codes of 8 bits are right to some percent.

    Weights whose moments stay in float32 are those of AdamW to rounding, until others differ.
    """
    (exact, *_) = run_ranks(2, sharded, "adamw", 6)
    for found in run_ranks(2, sharded, "adamw_8bit", 6):
        differences = [(a - b).abs().max().item() for a, b in zip(found, exact, strict=True)]
        assert 0 < differences[0] < 1e-2
    (exact, *_), (found, *_) = (
        run_ranks(2, sharded, optim, 1) for optim in ("adamw", "adamw_8bit")
    )
    assert not torch.equal(exact[0], network()[0].weight)
    for ours, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def stopped_and_resumed(optim: str, run: Path, saves: bool) -> list[torch.Tensor]:
    """Three steps and a save, or from there; then three more."""
    model = network()
    fully_shard(model)
    optimizer = optimizer_of(model, optim)
    scheduler = build_scheduler(optimizer, TrainSection(learning_rate=RATE), 6)
    if saves:
        update(model, optimizer, 0, 3)
        saver = CheckpointSaver(Folder.at(run), None)
        saver.start(model, optimizer, Progress(3, 8, ((0.0,),), 0, 0), {"step": 3})
        update(model, optimizer, 3, 4)
        assert saver.finish() is None
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    load_checkpoint(Folder.at(run), 3, model, optimizer)
    move_to_step(scheduler, 3)
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(RATE / 2)] * 2
    update(model, optimizer, 3, 6)
    return whole(model)


@pytest.mark.parametrize("optim", SMALL)
def test_a_resumed_optimizer_has_the_bytes_of_its_state(optim, run_ranks, tmp_path):
    """At the same number of workers bytes, at another rounding, of shards with other rows."""
    first, second = run_ranks(2, stopped_and_resumed, optim, tmp_path, True)
    again, _ = run_ranks(2, stopped_and_resumed, optim, tmp_path, False)
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, first, again))
    for n_ranks in (1, 3):
        for ours, expected in zip(
            run_ranks(n_ranks, stopped_and_resumed, optim, tmp_path, False)[0], first, strict=True
        ):
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("optim", SMALL)
def test_a_killed_run_ends_byte_identical(optim, run_ranks, inputs, tmp_path):
    """From step 4 of 10, with the rates of its schedule; what is left is what a kill leaves."""
    whole_run, run = tmp_path / "whole", tmp_path / "run"
    changes = {"optim": optim, "max_steps": 10, "save_steps": 4, "eval_steps": None}
    run_ranks(2, train_small, inputs, whole_run, changes)
    shutil.copytree(whole_run, run)
    shutil.rmtree(run / "final")
    for step in (8, 10):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08}")
    run_ranks(2, train_small, inputs, run, changes, new_processes=True)
    assert "resumed at step 4 of 10" in (run / "run.log").read_text()
    assert metrics_without_times(run) == metrics_without_times(whole_run)
    weights = [folder / "final" / "model.safetensors" for folder in (whole_run, run)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_the_state_of_another_optimizer_is_refused(run_ranks, inputs, tmp_path):
    """Also where other settings are wanted."""
    changes = {"max_steps": 2, "eval_steps": None}
    run_ranks(1, train_small, inputs, tmp_path / "run", changes)
    changes |= {"optim": "adafactor", "resume_changed": True, "max_steps": 3}
    with pytest.raises(AssertionError, match="has the state of optim=adamw, not of adafactor: set"):
        run_ranks(1, train_small, inputs, tmp_path / "run", changes)


def not_finite(folder: Path, optim: str) -> bool:
    """Whether a step whose gradient is infinite leaves weights and state as they were."""
    config = ORPOConfig(learning_rate=RATE, optim=optim)
    device = torch.device("cpu")
    model = build_model(config, str(folder / "model"), device)
    optimizer = build_optimizer(model, config.train)
    state = TrainState(
        model, optimizer, build_scheduler(optimizer, config.train, 9), orpo(0.1), 1.0, 0, device
    )
    batches = token_stream(folder, dist.get_rank(), dist.get_world_size()).batches(0, 3)
    sums = torch.zeros(N_SUMS, dtype=torch.float64)
    train_step(state, next(batches), sums)
    with torch.no_grad():
        next(model.parameters()).mul_(1e21)
    state_before, before = str(optimizer.state_dict()), whole(model)
    with pytest.raises(NonFiniteError):
        train_step(state, next(batches), sums)
    kept = str(optimizer.state_dict()) == state_before
    return kept and all(map(torch.equal, whole(model), before))


@pytest.mark.parametrize("optim", ["adamw", *SMALL])
def test_a_gradient_that_is_not_finite_moves_nothing(optim, run_ranks, inputs):
    assert run_ranks(2, not_finite, inputs, optim) == [True, True]


def held_bytes(optim: str) -> tuple[int, float]:
    """Bytes of the state of a whole network, and what is foretold."""
    model = network()
    optimizer = optimizer_of(model, optim)
    update(model, optimizer, 0, 1)

    def size(value: Any) -> int:
        parts = [value.codes, value.scale] if hasattr(value, "codes") else [value]
        return sum(part.nbytes for part in parts)

    held = sum(
        size(value)
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.ndim
    )
    return held, sum(state_bytes(optim, p.shape) for p in model.parameters())


@pytest.mark.parametrize("optim", ["adamw", *SMALL])
def test_the_state_has_the_bytes_that_are_foretold(optim):
    held, foretold = held_bytes(optim)
    assert held == foretold


def test_shards_of_8_bits_are_whole_blocks():
    """A norm, a small matrix, rows of no blocks; then rows of 256, 7 x 128, and matrices."""
    shapes = ((8192,), (4, 512), (4096, 641), (8, 512), (151_936, 896), (8, 24, 32))
    assert [block_size(shape) for shape in shapes] == [0, 0, 0, 256, 128, 256]


def test_8_bits_are_not_offloaded():
    with pytest.raises(ConfigError, match="optim: adamw_8bit is not offloaded"):
        ORPOConfig(optim="adamw_8bit", cpu_offload=True)
