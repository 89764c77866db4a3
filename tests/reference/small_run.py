"""A small training run on random token groups, for tests that run it on gloo processes."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.dataset.order import Order
from orpo_ray.dataset.shards import TokenSet, write_shard
from orpo_ray.dataset.stream import BatchPlan, TokenStream
from orpo_ray.preference.groups import PromptGroup, RowId
from orpo_ray.pretrained import ModelSource
from orpo_ray.runs.files import read_metrics
from orpo_ray.storage.folder import Folder, FolderLike
from orpo_ray.training.job import TrainingJob
from orpo_ray.training.loop import run_training
from tests.reference.timing import TIMING

VOCABULARY = 96
N_SHARDS, SHARD_ROWS, BATCH = 5, 17, 8


def make_inputs(folder: Path) -> None:
    """Write a tiny llama with its tokenizer, and a token set of 85 random pairs."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(
        folder / "model"
    )
    rng = np.random.default_rng(0)

    def ids(low: int) -> np.ndarray:
        return rng.integers(2, VOCABULARY, rng.integers(low, 10)).astype(np.int32)

    (folder / "tokens").mkdir()
    shards = tuple(
        write_shard(
            str(folder / "tokens" / f"{shard}.parquet"),
            [
                PromptGroup(ids(0), (ids(2), ids(2)), ((0, 1),), (RowId(0, shard * 100 + row),))
                for row in range(SHARD_ROWS)
            ],
        )
        for shard in range(N_SHARDS)
    )
    TokenSet(Folder.at(folder / "tokens"), shards, ("random",), {}).save()


def token_stream(
    folder: Path, rank: int, world_size: int, batch_groups: int = BATCH
) -> TokenStream:
    """The feed of one rank over the token set of `make_inputs`."""
    tokens = TokenSet.load(str(folder / "tokens"))
    assert tokens is not None
    lengths = tuple(shard.n_groups for shard in tokens.shards)
    order = Order(lengths, window_shards=2, seed=42, shuffle=True)
    plan = BatchPlan(batch_groups, budget_tokens=60, chunk_tokens=32, prompt_counts=True)
    return TokenStream(tokens, order, plan, rank, world_size)


def train_small(folder: Path, run: FolderLike, changes: dict[str, Any]) -> dict[str, Any]:
    """Train on this rank; returns the run's summary.

    Args:
        folder: of `make_inputs`.
        run: the run directory.
        changes: leaves of the config; `evaluate=False` leaves out the evaluation set.
    """
    changes = dict(changes)
    evaluate = changes.pop("evaluate", True)
    Folder.at(run).make()
    defaults = {
        "max_steps": 24,
        "save_steps": 7,
        "save_total_limit": 3,
        "logging_steps": 5,
        "eval_steps": 10,
        "learning_rate": 1e-2,
        "global_batch_size": BATCH,
        "max_new_tokens": 4,
    }
    config = ORPOConfig(**(defaults | changes))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    stream = token_stream(folder, rank, world_size, config.pairs_per_step)
    plan = dataclasses.replace(stream.plan, prompt_counts=config.orpo.prompt_counts)
    order = dataclasses.replace(stream.order, shuffle=False)
    evaluation = dataclasses.replace(stream, order=order, plan=plan)
    plan = dataclasses.replace(plan, chosen_alone=config.orpo.chosen_alone)
    job = TrainingJob(
        config=config,
        model=ModelSource(str(folder / "model"), str(folder / "model")),
        run_directory=run,
        train=dataclasses.replace(stream, plan=plan),
        evals={"eval_": evaluation} if evaluate else {},
        device=torch.device("cpu"),
        report=lambda metrics: None,
    )
    return run_training(job)


def metrics_without_times(run: Path) -> list[dict[str, Any]]:
    """What a run logged, without what differs between two equal runs."""
    return [{k: v for k, v in line.items() if k not in TIMING} for line in read_metrics(run)]
