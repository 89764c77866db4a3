"""Scoring a token set with Ray Data: actors with a model each, a file of scores a shard; driver."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ray.data import ActorPoolStrategy

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.dataset.pair_index import PairStats
from orpo_ray.dataset.shards import TokenSet, read_shard
from orpo_ray.orchestration.tasks import map_tasks
from orpo_ray.preference.groups import PromptGroup
from orpo_ray.storage.bucket import make_folder
from orpo_ray.storage.mirror import fetch_folder, publish, remove
from orpo_ray.training.allocator import memory_settings

_PARTS = "parts"
_TASK_GROUPS = 512


class _ScoreGroups:
    """An actor of Ray Data that holds the model and scores stretches of shards."""

    def __init__(self, config: ORPOConfig, model: str, tokens: TokenSet, folder: str) -> None:
        import torch

        from orpo_ray.training.scoring import PairScorer

        cpus = (config.ray.resources_per_worker or {}).get("CPU", 1.0)
        torch.set_num_threads(max(1, int(cpus)))
        device = torch.device("cuda" if config.ray.use_gpu else "cpu")
        self._directory, self._folder = tokens.directory, Path(folder)
        self._open_shard = tokens.shards[0].name, self._read(tokens.shards[0].name)
        self._scorer = PairScorer.load(config, model, device, self._open_shard[1])

    def _read(self, shard: str) -> list[PromptGroup]:
        return read_shard(f"{self._directory}/{shard}")

    def __call__(self, row: dict[str, str]) -> list[dict[str, str]]:
        """Write the scores of one stretch; the answer names their file."""
        item = json.loads(row["item"])
        if self._open_shard[0] != item["shard"]:
            self._open_shard = item["shard"], self._read(item["shard"])
        groups = self._open_shard[1][item["first"] : item["first"] + _TASK_GROUPS]
        path = self._folder / f"{item['number']:08d}.parquet"
        make_folder(self._folder)
        pq.write_table(self._scorer.score(groups), path)
        publish(path)
        answer = {"name": path.name, "problem": self._scorer.problem}
        return [{"item": json.dumps(answer)}]


def score_token_set(
    config: ORPOConfig, model: str, tokens: TokenSet, path: Path
) -> tuple[pa.Table, str | None]:
    """Score every pair with a model and write the scores to one file.

    Args:
        config: settled by the cluster; up to `num_workers` models are loaded.
        model: folder or hub id.
        tokens: of the pairs.
        path: where `scores.parquet` goes.

    Returns:
        The scores in the order of the pairs, with the row's file, its number from 1 and its
        subset; and why the model computes padded rows, if it does so.
    """
    folder = path.parent / _PARTS
    remove(folder)
    folder.mkdir(parents=True)
    stretches = [
        (shard.name, first)
        for shard in tokens.shards
        for first in range(0, shard.n_groups, _TASK_GROUPS)
    ]
    items = [
        {"number": number, "shard": shard, "first": first}
        for number, (shard, first) in enumerate(stretches)
    ]
    resources = dict(config.ray.resources_per_worker or {})
    found = map_tasks(
        items,
        _ScoreGroups,
        fn_constructor_args=(config, model, tokens, str(folder)),
        compute=ActorPoolStrategy(min_size=1, max_size=min(config.ray.max_workers, len(items))),
        num_cpus=resources.pop("CPU", 0.0),
        num_gpus=resources.pop("GPU", 0.0),
        resources=resources,
        runtime_env={"env_vars": memory_settings(bool(config.ray.use_gpu))},
    )
    fetch_folder(folder)
    tables = [pq.read_table(folder / name) for name in sorted(answer["name"] for answer in found)]
    subsets = _subsets(tokens) if config.data.eval_subset_column else {}
    scores = _with_places(pa.concat_tables(tables), tokens, subsets)
    pq.write_table(scores, path)
    remove(folder)
    return scores, next((a["problem"] for a in found if a["problem"]), None)


def _with_places(
    scores: pa.Table, tokens: TokenSet, subsets: Mapping[tuple[int, int], str]
) -> pa.Table:
    """File, row from 1, and subset in place of the index of the source."""
    keys = list(zip(scores["source"].to_pylist(), scores["row"].to_pylist(), strict=True))
    columns: Mapping[str, Any] = {
        "file": pa.array([tokens.sources[source] for source, _ in keys]).dictionary_encode(),
        "row": pa.array([row + 1 for _, row in keys], pa.int64()),
        "subset": pa.array([subsets.get(key, "") for key in keys]).dictionary_encode(),
    }
    rest = scores.drop_columns(["source", "row"])
    return pa.table({**columns, **{name: rest[name] for name in rest.column_names}})


def _subsets(tokens: TokenSet) -> dict[tuple[int, int], str]:
    """What every row that says so belongs to, by source and row."""
    found: dict[tuple[int, int], str] = {}
    for name in PairStats.names(tokens.directory):
        stats = PairStats.load(tokens.directory, name)
        source = int(name.partition("-")[0])
        for row, subset in zip(stats.rows.tolist(), stats.subsets.tolist(), strict=True):
            if subset:
                found[source, row] = subset
    return found
