"""Scores of pairs by the one evaluation engine, against padded rows in float64."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.dataset.order import Order
from orpo_ray.dataset.shards import TokenSet, write_shard
from orpo_ray.dataset.stream import BatchPlan, TokenStream
from orpo_ray.preference.groups import PromptGroup
from orpo_ray.runs.files import read_metrics
from orpo_ray.storage.folder import Folder
from orpo_ray.training.evaluation import SCHEMA, run_evaluation
from tests.reference.models import odd_groups, tiny_model
from tests.reference.padded import reference_orpo
from tests.reference.small_run import train_small

SCORES = ("logps_chosen", "logps_rejected", "log_odds")


def evaluated(
    tokens: str, model: str, changes: dict[str, Any], batch_groups: int = 4
) -> tuple[pa.Table | None, dict[str, float], list[str]]:
    """The scores (rank 0 alone has them), metrics and notices of this rank."""
    config = ORPOConfig(**({"bf16": False} | changes))
    token_set = TokenSet.load(tokens)
    assert token_set is not None
    order = Order(tuple(shard.n_groups for shard in token_set.shards), 1, 0, shuffle=False)
    plan = BatchPlan(batch_groups, config.eval_microbatch_tokens, 16, prompt_counts=True)
    stream = TokenStream(token_set, order, plan, dist.get_rank(), dist.get_world_size())
    notices: list[str] = []
    device = torch.device("cpu")
    found = run_evaluation(config, model, {"eval_": stream}, device, notices.append)
    return found.scores.get("eval_"), found.metrics, notices


def write_tokens(folder: Path, groups: list[PromptGroup]) -> str:
    """A token set of two shards."""
    folder.mkdir()
    half = len(groups) // 2
    parts = (groups[:half], groups[half:])
    shards = tuple(write_shard(str(folder / f"{i}.parquet"), part) for i, part in enumerate(parts))
    TokenSet(Folder.at(folder), shards, ("odd",), {}).save()
    return str(folder)


def single_pairs(groups: list[PromptGroup]) -> list[PromptGroup]:
    """Every pair as a group of its own, in order."""
    return [
        PromptGroup(
            group.prompt, (group.completions[a], group.completions[b]), ((0, 1),), (row_id,)
        )
        for group in groups
        for (a, b), row_id in zip(group.pairs, group.row_ids, strict=True)
    ]


@pytest.mark.parametrize(("name", "attention"), [("llama", "packed"), ("falcon", "padded")])
@pytest.mark.parametrize(("n_ranks", "budget"), [(1, 30), (1, 1000), (2, 30)])
def test_every_pair_has_its_own_score(
    run_ranks: Callable[..., Any],
    name: str,
    attention: str,
    n_ranks: int,
    budget: int,
    tmp_path: Path,
) -> None:
    """In the order of rows, whatever rank and microbatch it was in; Falcon falls back and says so.

    All pairs of one prompt are of one row, as those of a ranking are: they stay in their order.
    """
    tiny_model(name, torch.float32).save_pretrained(tmp_path / "model")
    groups = [group for group in odd_groups(3) if len(group.prompt)]
    ranking = max(range(len(groups)), key=lambda i: len(groups[i].pairs))
    row_ids = (groups[ranking].row_ids[0],) * len(groups[ranking].pairs)
    groups[ranking] = dataclasses.replace(groups[ranking], row_ids=row_ids)
    tokens = write_tokens(tmp_path / "tokens", groups)
    changes = {"max_tokens_per_microbatch": budget}
    answers = run_ranks(n_ranks, evaluated, tokens, str(tmp_path / "model"), changes)
    table, metrics, notices = answers[0]
    assert all(answer[0] is None for answer in answers[1:])
    said = [text for text in notices if text.startswith("warning: falcon: padded rows")]
    assert len(said) == (attention == "padded")
    assert table.schema == SCHEMA
    pairs = single_pairs(groups)
    rows = [pair.row_ids[0] for pair in pairs]
    assert table["row"].to_pylist() == [row.row for row in rows]
    model = tiny_model(name, torch.float64)
    for index, pair in enumerate(pairs):
        with torch.no_grad():
            expected = reference_orpo(model, [pair], beta=0.1).metrics
        for column, metric in zip(
            SCORES, ("logps/chosen", "logps/rejected", "log_odds_chosen"), strict=True
        ):
            assert table[column][index].as_py() == pytest.approx(expected[metric], abs=2e-4)
        lengths = [len(completion) for completion in pair.completions]
        assert [table[f"{s}_tokens"][index].as_py() for s in ("chosen", "rejected")] == lengths
    margin = table["logps_chosen"].to_numpy() - table["logps_rejected"].to_numpy()
    assert np.array_equal(table["margin"].to_numpy(), margin)
    assert len(set(table["prompt_key"].to_pylist())) == len(groups)
    assert metrics["eval_rewards/accuracies"] == pytest.approx((margin > 0).mean())
    assert metrics["eval_log_odds_chosen"] == pytest.approx(table["log_odds"].to_numpy().mean())


@pytest.fixture(scope="module")
def adapted(run_ranks, inputs, tmp_path_factory) -> Path:
    """A run that ends with LoRA adapters."""
    run = tmp_path_factory.mktemp("adapted")
    run_ranks(1, train_small, inputs, run, {"lora_r": 4, "max_steps": 8, "eval_steps": 8})
    return run


@pytest.mark.parametrize("shard_size", [None, 1])
def test_adapters_are_evaluated_on_their_base(run_ranks, inputs, adapted, shard_size):
    """On two ranks, sharded or with a copy each: as training evaluated them before it exported.

    The config may be the run's own, whose `lora_r` says what training adds to a base.
    """
    last = read_metrics(adapted)[-1]
    changes = {"num_workers": 2, "shard_size": shard_size, "lora_r": 4}
    tokens = str(inputs / "tokens")
    (_, metrics, _), _ = run_ranks(2, evaluated, tokens, str(adapted / "final"), changes, 8)
    assert metrics["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
    (_, base, _), _ = run_ranks(2, evaluated, tokens, str(inputs / "model"), changes, 8)
    assert abs(base["eval_loss"] - metrics["eval_loss"]) > 1e-3
