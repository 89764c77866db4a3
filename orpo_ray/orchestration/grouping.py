"""Putting the pairs of one prompt into one group, wherever in the data they stand.

The driver holds one hash a pair and decides which pairs belong together, in the order in which
their prompts first appear; data tasks read them from the token shards and write new ones.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from orpo_ray.orchestration.data_tasks import each
from orpo_ray.preference.groups import PromptGroup, merge_groups
from orpo_ray.preference.shards import Shard, read_shard, write_shard

_OPEN_SHARDS = 8


def prompt_keys(groups: Sequence[PromptGroup]) -> list[str]:
    """A hash of every group's prompt."""
    return [xxhash.xxh3_128_hexdigest(group.prompt.tobytes()) for group in groups]


def group_shards(
    directory: str, summaries: Sequence[Mapping[str, Any]], shard_groups: int
) -> tuple[tuple[Shard, ...], int]:
    """Write shards of whole prompts beside the shards of pairs.

    Args:
        directory: of the token set.
        summaries: of the shards of pairs, in order, with their `prompt_keys`.
        shard_groups: groups of a new shard.

    Returns:
        The new shards in order, and the tokens of the longest group.
    """
    members: dict[str, list[tuple[str, int]]] = {}
    for summary in summaries:
        if summary["shard"]:
            for row, key in enumerate(summary["prompt_keys"]):
                members.setdefault(key, []).append((summary["shard"]["name"], row))
    everything = iter(members.values())
    items: list[dict[str, Any]] = []
    while part := list(itertools.islice(everything, shard_groups)):
        items.append({"number": len(items), "members": part})
    answers = sorted(each(items, _MergeGroups(directory)), key=lambda answer: answer["number"])
    shards = tuple(Shard(**answer["shard"]) for answer in answers)
    return shards, max((answer["longest_group_tokens"] for answer in answers), default=0)


@dataclass(frozen=True)
class _MergeGroups:
    """The data task that writes one shard of whole prompts."""

    directory: str

    def __call__(self, row: dict[str, str]) -> list[dict[str, str]]:
        item = json.loads(row["item"])
        opened: dict[str, list[PromptGroup]] = {}
        groups = []
        for places in item["members"]:
            parts = []
            for name, index in places:
                if name not in opened:
                    if len(opened) == _OPEN_SHARDS:
                        del opened[next(iter(opened))]
                    opened[name] = read_shard(str(Path(self.directory, name)))
                parts.append(opened[name][index])
            groups.append(merge_groups(parts))
        path = f"{self.directory}/prompts-{item['number']:06d}.parquet"
        answer = {
            "number": item["number"],
            "shard": asdict(write_shard(path, groups)),
            "longest_group_tokens": max(group.n_tokens for group in groups),
        }
        return [{"item": json.dumps(answer)}]
