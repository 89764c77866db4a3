"""Scoring a token set with Ray Data: actors with a model each, a file of scores a shard; driver."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from orpo_ray.config import ORPOConfig
from orpo_ray.orchestration.cluster import HOST_MEMORY
from orpo_ray.orchestration.pair_stats import STATS, PairStats
from orpo_ray.preference.shards import TokenSet, read_shard

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
        sample = read_shard(f"{tokens.directory}/{tokens.shards[0].name}")
        self._scorer = PairScorer.load(config, model, device, sample)
        self._tokens, self._folder = tokens, Path(folder)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        names = []
        for text in batch["item"]:
            item = json.loads(text)
            groups = read_shard(f"{self._tokens.directory}/{item['shard']}")
            table = self._scorer.score(groups[item["first"] : item["first"] + _TASK_GROUPS])
            path = self._folder / f"{item['number']:08d}.parquet"
            temporary = path.with_suffix(".tmp")
            pq.write_table(table, temporary)
            temporary.replace(path)
            names.append(json.dumps({"name": path.name, "problem": self._scorer.problem}))
        return {"item": np.array(names)}


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
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    items = [
        {"shard": shard.name, "first": first}
        for shard in tokens.shards
        for first in range(0, shard.n_groups, _TASK_GROUPS)
    ]
    rows = [{"item": json.dumps(item | {"number": i})} for i, item in enumerate(items)]
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    resources = dict(config.ray.resources_per_worker or {})
    answers = (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        .map_batches(
            _ScoreGroups,
            batch_size=1,
            fn_constructor_args=(config, model, tokens, str(folder)),
            compute=ray.data.ActorPoolStrategy(
                min_size=1, max_size=min(config.ray.max_workers, len(rows))
            ),
            num_cpus=resources.pop("CPU", 0.0),
            num_gpus=resources.pop("GPU", 0.0),
            resources=resources,
            runtime_env=None if config.ray.use_gpu else {"env_vars": HOST_MEMORY},
        )
        .take_all()
    )
    found = [json.loads(answer["item"]) for answer in answers]
    tables = [pq.read_table(folder / name) for name in sorted(answer["name"] for answer in found)]
    scores = _with_places(pa.concat_tables(tables), tokens)
    pq.write_table(scores, path)
    shutil.rmtree(folder)
    return scores, next((a["problem"] for a in found if a["problem"]), None)


def _with_places(scores: pa.Table, tokens: TokenSet) -> pa.Table:
    """File, row from 1, and subset in place of the index of the source."""
    subsets = _subsets(tokens)
    places = zip(scores["source"].to_pylist(), scores["row"].to_pylist(), strict=True)
    keys = list(places)
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
    for path in Path(tokens.directory, STATS).glob("*.npz"):
        stats = PairStats.load(tokens.directory, path.stem)
        source = int(path.stem.partition("-")[0])
        for row, subset in zip(stats.rows.tolist(), stats.subsets.tolist(), strict=True):
            if subset:
                found[source, row] = subset
    return found
