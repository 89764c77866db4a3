"""Rewriting token shards without dropped pairs or grouped by prompt; on the driver and in tasks.

The driver plans new shards from `PairStats` alone; data tasks read the old shards and write them.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from orpo_ray.dataset.pair_index import PairStats, are_among
from orpo_ray.dataset.request import IngestRequest, MapTasks
from orpo_ray.dataset.shards import Shard, read_shard, write_shard
from orpo_ray.dataset.tokenize import QUARANTINE
from orpo_ray.preference.groups import PromptGroup, merge_groups
from orpo_ray.preference.records import Reason
from orpo_ray.storage.folder import Folder

_OPEN_SHARDS = 8
PairLocation = tuple[str, int]
"""File name of a shard and the index of a group, still a plain pair, in it."""


@dataclass(frozen=True)
class NewShards:
    """A sequence of groups to be written as new shards.

    Args:
        name: prefix of the shards' file names.
        source: index of the source file of all pairs, or -1 if they come from several.
        members: for every group, the locations of its pairs.
    """

    name: str
    source: int
    members: Iterable[Sequence[PairLocation]]


def group_by_key(pairs: Iterable[tuple[int, PairLocation]]) -> Iterable[list[PairLocation]]:
    """Group (key, location) entries by key, in the order in which keys first occur."""
    members: dict[int, list[PairLocation]] = {}
    for key, location in pairs:
        members.setdefault(key, []).append(location)
    return members.values()


def write_new_shards(
    tokens: Folder, parts: Sequence[NewShards], shard_groups: int, map_tasks: MapTasks
) -> tuple[tuple[Shard, ...], int]:
    """Write new shards beside the old ones, in data tasks.

    Args:
        tokens: folder of the token set.
        parts: what to write, in order.
        shard_groups: maximum number of groups in a new shard.
        map_tasks: runs the data tasks.

    Returns:
        The new shards in order, and the number of tokens of the longest group.
    """
    items: list[dict[str, Any]] = []
    for part in parts:
        everything = iter(part.members)
        while members := list(itertools.islice(everything, shard_groups)):
            name = f"{part.name}-{len(items):06d}"
            item = {"name": name, "source": part.source, "members": members}
            items.append(item | {"number": len(items)})
    answers = sorted(
        map_tasks(items, _WriteMergedShard(tokens)), key=lambda answer: answer["number"]
    )
    shards = tuple(Shard(**answer["shard"]) for answer in answers)
    return shards, max((answer["longest_group_tokens"] for answer in answers), default=0)


@dataclass(frozen=True)
class _WriteMergedShard:
    """Data task that merges the pairs of each group and writes one new shard."""

    tokens: Folder

    def __call__(self, row: dict[str, str]) -> list[dict[str, str]]:
        item = json.loads(row["item"])
        opened: dict[str, list[PromptGroup]] = {}
        groups = []
        for locations in item["members"]:
            parts = []
            for name, index in locations:
                if name not in opened:
                    if len(opened) == _OPEN_SHARDS:
                        del opened[next(iter(opened))]
                    opened[name] = read_shard(str(self.tokens.fetch_file(name, once=True)))
                parts.append(opened[name][index])
            groups.append(merge_groups(parts))
        shard = write_shard(f"{self.tokens.path}/{item['name']}.parquet", groups, item["source"])
        self.tokens.publish(shard.name)
        answer = {
            "number": item["number"],
            "shard": asdict(shard),
            "longest_group_tokens": max(group.n_tokens for group in groups),
        }
        return [{"item": json.dumps(answer)}]


def iter_stats(tokens: Folder, summaries: Sequence[Mapping[str, Any]]) -> Iterator[PairStats]:
    """Load the stats of every shard in order, one at a time."""
    return (PairStats.load(tokens, summary["name"]) for summary in summaries)


def load_keys(tokens: Folder, name: str) -> Any:
    """Concatenate one array of keys (a field of `PairStats`) over all shards, in no fixed order."""
    parts = [PairStats.load(tokens, stem) for stem in PairStats.names(tokens)]
    return np.concatenate([np.empty(0, np.uint64), *(getattr(part, name) for part in parts)])


def find_dropped_pairs(
    request: IngestRequest, tokens: Folder, summaries: Sequence[dict[str, Any]]
) -> list[Any]:
    """Find duplicates and overlaps with other token sets, and correct the counts in `summaries`.

    Pairs that contradict another one, which has their answers swapped, are counted and kept.

    Returns:
        For every shard a boolean array that is True for each pair to drop.
    """
    keys = [stats.pair_keys for stats in iter_stats(tokens, summaries)]
    everything = np.concatenate([np.empty(0, np.uint64), *keys])
    repeated = np.ones(len(everything), dtype=bool)
    distinct, firsts = np.unique(everything, return_index=True)
    repeated[firsts] = False
    del everything, firsts, keys
    others = [load_keys(other, "prompt_keys") for other in request.other_sets]
    elsewhere = np.unique(np.concatenate([np.empty(0, np.uint64), *others]))
    masks, first, lines = [], 0, []
    for summary, stats in zip(summaries, iter_stats(tokens, summaries), strict=True):
        here = repeated[first : first + len(stats.rows)]
        first += len(stats.rows)
        summary["duplicate_pairs"] = int(here.sum())
        summary["contradicting_pairs"] = int(are_among(stats.swapped_keys, distinct).sum())
        overlaps = are_among(stats.prompt_keys, elsewhere) & ~stats.held
        doubles = here & ~overlaps if request.drop_duplicates else np.zeros_like(here)
        mask = doubles | overlaps
        masks.append(mask)
        if mask.any():
            reasons = {Reason.DUPLICATE: doubles, Reason.OVERLAP: overlaps}
            lines += _count_dropped(request, summary, stats, reasons)
    if lines:
        tokens.write_text(f"{QUARANTINE}/dropped.jsonl", "\n".join(lines) + "\n")
    return masks


def _count_dropped(
    request: IngestRequest,
    summary: dict[str, Any],
    stats: PairStats,
    reasons: Mapping[Reason, Any],
) -> list[str]:
    """Count the dropped rows and pairs of a shard; return a quarantine line for each such row.

    A row counts as dropped when it loses its last pair.
    """
    kept = ~np.logical_or.reduce(list(reasons.values()))
    for name, side in (("rows_kept", ~stats.held), ("rows_held_out", stats.held)):
        summary[name] = len(np.unique(stats.rows[kept & side]))
    lost = set(stats.rows.tolist()) - set(stats.rows[kept].tolist())
    details = {
        Reason.DUPLICATE: "repeats an earlier pair",
        Reason.OVERLAP: "its prompt is also in an evaluation set",
    }
    lines = []
    for reason, mask in reasons.items():
        rows = sorted(set(stats.rows[mask].tolist()) & lost)
        lost -= set(rows)
        summary["refused"][str(reason)] = summary["refused"].get(str(reason), 0) + len(rows)
        summary["pairs_left_out"] += int((mask & ~np.isin(stats.rows, rows)).sum())
        path = request.files[summary["source"]]
        entry = {"file": path, "reason": reason, "detail": details[reason], "excerpt": ""}
        lines += [json.dumps(entry | {"row": row + 1}, ensure_ascii=False) for row in rows]
    return lines


def _locations(
    tokens: Folder,
    summaries: Sequence[Mapping[str, Any]],
    dropped: Sequence[Any],
    part: str,
) -> Iterator[tuple[int, int, PairLocation]]:
    """Yield (source, group key, location) of every kept pair of `shard` or `held_shard`."""
    for summary, stats, mask in zip(summaries, iter_stats(tokens, summaries), dropped, strict=True):
        side = stats.held if part == "held_shard" else ~stats.held
        for index, (key, out) in enumerate(
            zip(stats.group_keys[side].tolist(), mask[side].tolist(), strict=True)
        ):
            if not out:
                yield summary["source"], key, (summary[part]["name"], index)


def rewrite_part(
    request: IngestRequest,
    tokens: Folder,
    summaries: Sequence[Mapping[str, Any]],
    dropped: Sequence[Any],
    part: str,
    map_tasks: MapTasks,
) -> tuple[tuple[Shard, ...], int]:
    """Rewrite one part (`shard` or `held_shard`) of a token set without dropped pairs.

    With `group_by_prompt`, pairs of one prompt are grouped across all sources; otherwise every
    source keeps its own shards.

    Returns:
        The new shards in order, and the number of tokens of the longest group.
    """
    locations = _locations(tokens, summaries, dropped, part)
    if request.group_by_prompt:
        members = group_by_key((key, location) for _, key, location in locations)
        parts = [NewShards(f"{part}-prompts", -1, members)]
    else:
        kept: dict[int, list[list[PairLocation]]] = {}
        for source, _, location in locations:
            kept.setdefault(source, []).append([location])
        parts = [NewShards(f"{part}-kept", source, kept[source]) for source in sorted(kept)]
    return write_new_shards(tokens, parts, request.shard_rows, map_tasks)
