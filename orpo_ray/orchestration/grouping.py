"""Writing token shards anew: pairs of one prompt as one group, without pairs that are dropped.

The driver holds a few numbers a pair and decides which pairs stand where, in the order in which
they first appear; data tasks read them from the token shards and write new ones.
"""

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orpo_ray.orchestration.data_tasks import each
from orpo_ray.preference.groups import PromptGroup, merge_groups
from orpo_ray.preference.shards import Shard, read_shard, write_shard

_OPEN_SHARDS = 8
Place = tuple[str, int]


@dataclass(frozen=True)
class NewShards:
    """Groups that become shards of their own.

    Args:
        name: of the files.
        source: index of the source file of all of them, or -1.
        members: of every group the pairs in it, as shard and place there.
    """

    name: str
    source: int
    members: Iterable[Sequence[Place]]


def by_prompt(pairs: Iterable[tuple[int, Place]]) -> Iterable[list[Place]]:
    """The places of pairs with the same key, in the order of their first."""
    members: dict[int, list[Place]] = {}
    for key, place in pairs:
        members.setdefault(key, []).append(place)
    return members.values()


def rewrite(
    directory: str, parts: Sequence[NewShards], shard_groups: int
) -> tuple[tuple[Shard, ...], int]:
    """Write new shards beside the old ones.

    Args:
        directory: of the token set.
        parts: in order.
        shard_groups: groups of a new shard.

    Returns:
        The new shards in order, and the tokens of the longest group.
    """
    items: list[dict[str, Any]] = []
    for part in parts:
        everything = iter(part.members)
        while members := list(itertools.islice(everything, shard_groups)):
            name = f"{part.name}-{len(items):06d}"
            item = {"name": name, "source": part.source, "members": members}
            items.append(item | {"number": len(items)})
    answers = sorted(each(items, _MergeGroups(directory)), key=lambda answer: answer["number"])
    shards = tuple(Shard(**answer["shard"]) for answer in answers)
    return shards, max((answer["longest_group_tokens"] for answer in answers), default=0)


@dataclass(frozen=True)
class _MergeGroups:
    """The data task that writes one new shard."""

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
        path = f"{self.directory}/{item['name']}.parquet"
        answer = {
            "number": item["number"],
            "shard": asdict(write_shard(path, groups, item["source"])),
            "longest_group_tokens": max(group.n_tokens for group in groups),
        }
        return [{"item": json.dumps(answer)}]
