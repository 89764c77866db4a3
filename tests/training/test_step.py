"""A microbatch does not wait for the device, and says what to do when it does not fit."""

import dataclasses
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.dataset.packing import pack
from orpo_ray.models.build import build_model
from orpo_ray.models.microbatch import Microbatch
from orpo_ray.models.orpo_model import OrpoModel
from orpo_ray.objective.head import LossScale
from orpo_ray.objective.metrics import N_SUMS
from orpo_ray.objective.objectives import orpo
from orpo_ray.training.errors import MicrobatchTooLargeError
from orpo_ray.training.optimizer import build_optimizer, build_scheduler
from orpo_ray.training.step import TrainState, adamw_step, step_seed, train_step
from tests.reference.models import odd_groups, tiny_model
from tests.reference.small_run import make_inputs, token_stream


class CountReads(TorchDispatchMode):
    """Counts the operations that bring a number to the host: `.item()`, `float()`, `if tensor`."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
        )
        return func(*args, **(kwargs or {}))


def test_a_microbatch_reads_nothing_back():
    """Forward, backward and metrics, over a model whose own code does not either."""
    model = OrpoModel(tiny_model("llama", torch.float32), "packed", None)
    row = pack(odd_groups(1), 16, prompt_counts=True)
    sums = torch.zeros(N_SUMS, dtype=torch.float64)
    with CountReads() as reads:
        output = model(Microbatch(row, torch.device("cpu")), LossScale(0.1, 0.1, orpo(1.0)))
        output.loss.backward()
        sums += output.sums
        assert reads.count == 0
        float(sums[0])
    assert reads.count == 1


def calls_of_two_steps(folder: Path) -> list[str]:
    """Names of the operations that update weights or bring a number to the host, in order."""
    device = torch.device("cpu")
    config = ORPOConfig()
    model = build_model(config, str(folder / "model"), device)
    optimizer = build_optimizer(model, config.train)
    scheduler = build_scheduler(optimizer, config.train, 2)
    state = TrainState(model, optimizer, scheduler, orpo(0.1), 1.0, 0, device)
    seen: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (
                torch.ops.aten._local_scalar_dense.default,
                torch.ops.aten._fused_adamw_.default,
            ):
                seen.append(func.__name__.removesuffix(".default"))
            return func(*args, **(kwargs or {}))

    for batch in token_stream(folder, 0, 1).batches(0, 2):
        with Record():
            train_step(state, batch, torch.zeros(N_SUMS, dtype=torch.float64))
    return seen


def test_the_update_is_queued_before_the_host_waits_for_the_norm(run_ranks, tmp_path):
    """Else a GPU is idle from the end of its gradients until the update reaches it."""
    make_inputs(tmp_path)
    (seen,) = run_ranks(1, calls_of_two_steps, tmp_path)
    # One update for weights with decay and one for those without; then one read.
    assert seen == ["_fused_adamw_", "_fused_adamw_", "_local_scalar_dense"] * 2


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 100.0])
def test_gradients_are_clipped_inside_adamw_as_before_it(max_norm):
    """Against torch's own function; where nothing is clipped, to the bit."""
    torch.manual_seed(0)
    start = torch.randn(40, 8)
    ends = []
    for is_inside in (True, False):
        weight = torch.nn.Parameter(start.clone())
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
        for step in range(4):
            weight.grad = torch.randn(40, 8, generator=torch.Generator().manual_seed(step))
            if is_inside:
                adamw_step(optimizer, weight.grad.norm(), max_norm)
            else:
                torch.nn.utils.clip_grad_norm_([weight], max_norm or float("inf"))
                optimizer.step()
        ends.append(weight.detach())
    assert not torch.equal(ends[0], start)
    tolerance = 1e-6 if max_norm == 0.5 else 0.0
    torch.testing.assert_close(*ends, rtol=tolerance, atol=tolerance)


@pytest.mark.needs_gpu
@pytest.mark.parametrize("kernel", ["varlen", "flex", "sdpa"])
def test_a_microbatch_does_not_wait_for_the_gpu(kernel):
    """CUDA itself says so, of forward, backward and metrics, once kernels are there."""
    device = torch.device("cuda")
    model = OrpoModel(tiny_model("llama-wide", torch.bfloat16), "packed", None, kernel).to(device)
    row = pack(odd_groups(1), 16, prompt_counts=True)

    def microbatch() -> torch.Tensor:
        output = model(Microbatch(row, device), LossScale(0.1, 0.1, orpo(1.0)))
        output.loss.backward()
        return output.sums

    microbatch()
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings(action="ignore"):  # that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        sums = microbatch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sums.isfinite().all()


def test_the_seed_of_a_step_differs_by_step_and_rank_and_is_the_same_everywhere():
    """The literal is NumPy's SeedSequence of (42, 7, 1), which promises to stay what it is."""
    assert step_seed(42, 7, 1) == 9_828_885_297_459_491_986
    seeds = {step_seed(s, n, rank) for s in (41, 42) for n in range(50) for rank in range(4)}
    assert len(seeds) == 2 * 50 * 4
    torch.Generator().manual_seed(max(seeds))  # takes 64 bits


def too_large(folder: Path) -> str:
    """The message of a step whose host memory runs out; on a rank of its own.

    Some 1,500 positions by 100,000 words by 4 bytes is 600 MB of logits at once; 64 MB are left.
    """
    import resource

    config = ORPOConfig(global_batch_size=85, max_tokens_per_microbatch=10**6)
    device = torch.device("cpu")
    model = build_model(config, str(folder / "model"), device)
    optimizer = build_optimizer(model, config.train)
    scheduler = build_scheduler(optimizer, config.train, 1)
    state = TrainState(model, optimizer, scheduler, orpo(0.1), 1.0, 0, device)
    stream = token_stream(folder, 0, 1, 1)
    whole = token_stream(folder, 0, 1, 85)
    plan = dataclasses.replace(whole.plan, budget_tokens=10**6, chunk_tokens=10**6)
    batch = next(dataclasses.replace(whole, plan=plan).batches(0, 1))
    train_step(state, next(stream.batches(0, 1)), torch.zeros(N_SUMS, dtype=torch.float64))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 26), resource.RLIM_INFINITY))
    try:
        train_step(state, batch, torch.zeros(N_SUMS, dtype=torch.float64))
    except MicrobatchTooLargeError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "it fitted"


def test_memory_that_runs_out_names_the_budget_to_set(run_ranks, tmp_path):
    make_inputs(tmp_path)
    config = LlamaConfig(
        vocab_size=100_000,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    (message,) = run_ranks(1, too_large, tmp_path, new_processes=True)
    assert re.fullmatch(
        r"a microbatch of \d+ tokens does not fit into memory; set "
        r"max_tokens_per_microbatch=\d+ or less, or gradient_checkpointing=true",
        message,
    )
