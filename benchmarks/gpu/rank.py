"""A training worker without Ray: one rank, a model of random weights, and real pairs to feed it."""

import dataclasses
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.dataset.order import Order
from orpo_ray.dataset.shards import TokenSet
from orpo_ray.dataset.stream import BatchPlan, StepBatch, TokenStream
from orpo_ray.models import build as sharding
from orpo_ray.models.adapters import add_adapters
from orpo_ray.models.build import build_model
from orpo_ray.objective.metrics import N_SUMS, LossWeights, metrics_from_sums
from orpo_ray.objective.objectives import orpo
from orpo_ray.training.optimizer import build_optimizer, build_scheduler
from orpo_ray.training.step import TrainState, train_step
from results import CUDA, DEVICE, DRY, print_machine, record
from workload import make_folder

N_PAIRS = 48 if DRY else 960
BETA = 0.1
_IS_UNSHARDED = sharding.is_unsharded


def start_rank() -> None:
    """A process group of one rank, as a training worker has it."""
    print_machine()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    backend = "cpu:gloo,cuda:nccl" if CUDA else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def folder_of(size: str, vocabulary: str = "16k", name: str = "") -> Path:
    """A folder with a model of `workload.SIZES` and the pairs' tokens; made once a machine."""
    folder = Path(tempfile.gettempdir(), "orpo-gpu", f"{size}-{vocabulary}{name}")
    if not (folder / "tokens-1").exists():
        started = time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        with torch.device(DEVICE):  # where weights are drawn in no time
            make_folder(folder, os.environ["PAIRS"], size, vocabulary, N_PAIRS)
        record("folder", size=size, vocabulary=vocabulary, seconds=time.perf_counter() - started)
        if CUDA:
            torch.cuda.empty_cache()
    return folder


def stream(
    folder: Path, batch: int, chunk_tokens: int = 4096, shuffle: bool = False
) -> TokenStream:
    """The feed of a folder's pairs, a step in one microbatch as far as 16,384 tokens go."""
    tokens = TokenSet.load(str(folder / "tokens-1"))
    assert tokens is not None
    order = Order(tuple(s.n_groups for s in tokens.shards), 1, seed=0, shuffle=shuffle)
    return TokenStream(tokens, order, BatchPlan(batch, 16_384, chunk_tokens, True), 0, 1)


def built(folder: Path, by_layer: bool = False, **settings: Any) -> tuple[TrainState, ORPOConfig]:
    """A folder's model on this device with its optimizer.

    Args:
        folder: of `folder_of`.
        by_layer: whether every layer is an FSDP unit, as it is on several ranks.
        settings: of the config, besides those that all runs here have.
    """
    config = ORPOConfig(**({"learning_rate": 1e-5, "max_steps": 100, "bf16": CUDA} | settings))
    sharding.is_unsharded = (lambda *_: False) if by_layer else _IS_UNSHARDED
    return _train_state(build_model(config, str(folder / "model"), DEVICE), config), config


def built_with_lora(model_config: LlamaConfig, **settings: Any) -> TrainState:
    """Adapters on a frozen base in bf16 whose random weights are drawn on the device.

    The base is not part of FSDP's units, as that of QLoRA: one rank shards nothing.
    """
    config = ORPOConfig(**({"lora_r": 16, "max_steps": 100, "bf16": CUDA} | settings))
    with torch.device(DEVICE):
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16 if CUDA else torch.float32)
        try:
            causal_lm = LlamaForCausalLM(model_config)
        finally:
            torch.set_default_dtype(dtype)
        add_adapters(causal_lm, config.model, config.train.seed)
    adapters = [p for p in causal_lm.parameters() if p.requires_grad]
    for parameter in adapters:
        parameter.data = parameter.data.float()
    frozen = {p for p in causal_lm.parameters() if not p.requires_grad}
    return _train_state(sharding._sharded(causal_lm, DEVICE, config, ignored=frozen), config)


def _train_state(model: Any, config: ORPOConfig) -> TrainState:
    optimizer = build_optimizer(model, config.train)
    scheduler = build_scheduler(optimizer, config.train, 100)
    return TrainState(model, optimizer, scheduler, orpo(BETA), 1.0, 0, DEVICE)


def zeros() -> torch.Tensor:
    """Sums of metrics, to be added to by steps."""
    return torch.zeros(N_SUMS, dtype=torch.float64, device=DEVICE)


def losses(state: TrainState, batches: Sequence[StepBatch]) -> list[float]:
    """Train on each batch; its loss."""
    found = []
    for batch in batches:
        sums = zeros()
        train_step(state, batch, sums)
        found.append(metrics_from_sums(sums.tolist(), LossWeights(orpo(BETA), 0.0))["loss"])
    return found


def unshuffled(feed: TokenStream) -> TokenStream:
    """The same rows in the order of the files."""
    return dataclasses.replace(feed, order=dataclasses.replace(feed.order, shuffle=False))
