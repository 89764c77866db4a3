"""Rewriting token shards without dropped pairs or grouped by prompt; on the driver and in tasks.

The driver plans new shards from `PairStats` alone, in bounded memory, and writes each plan as a
file; data tasks read that and the old shards, and write the new ones.
"""

import itertools
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from orpo_ray.dataset.pair_index import load_columns
from orpo_ray.dataset.request import IngestRequest, MapTasks
from orpo_ray.dataset.shards import Shard, read_shard, write_shards
from orpo_ray.preference.groups import PromptGroup, merge_groups
from orpo_ray.storage.folder import Folder
from orpo_ray.storage.partitions import Partitions

PLANS = "plans"
_OPEN_SHARDS = 8
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Plan:
    """New shards of one file, as arrays.

    Args:
        names: files of old shards.
        files: for every pair the index of its file.
        rows: and its row there.
        groups: number of pairs of every new group.
        shards: number of groups of every new shard.
        sources: and its source, -1 if its pairs come from several.
    """

    names: npt.NDArray[np.str_]
    files: Rows
    rows: Rows
    groups: Rows
    shards: Rows
    sources: Rows

    def save(self, tokens: Folder, name: str) -> None:
        with tokens.replacing(f"{PLANS}/{name}.npz") as path, path.open("wb") as file:
            np.savez(file, **vars(self))

    @staticmethod
    def load(tokens: Folder, name: str) -> "_Plan":
        with np.load(tokens.fetch_file(f"{PLANS}/{name}.npz", once=True)) as arrays:
            return _Plan(**arrays)


@dataclass(frozen=True)
class _WritePlanned:
    """Data task that merges the pairs of each group and writes one file of new shards."""

    tokens: Folder

    def __call__(self, row: dict[str, str]) -> list[dict[str, str]]:
        item = json.loads(row["item"])
        plan = _Plan.load(self.tokens, item["name"])
        locations = zip(plan.names[plan.files].tolist(), plan.rows.tolist(), strict=True)
        opened: dict[str, list[PromptGroup]] = {}

        def pair(name: str, index: int) -> PromptGroup:
            if name not in opened:
                if len(opened) == _OPEN_SHARDS:
                    del opened[next(iter(opened))]
                opened[name] = read_shard(str(self.tokens.fetch_file(name, once=True)))
            return opened[name][index]

        groups = iter(
            [
                merge_groups([pair(*place) for place in itertools.islice(locations, size)])
                for size in plan.groups.tolist()
            ]
        )
        parts = [
            (source, list(itertools.islice(groups, size)))
            for source, size in zip(plan.sources.tolist(), plan.shards.tolist(), strict=True)
        ]
        shards = write_shards(f"{self.tokens.path}/{item['name']}.parquet", parts)
        self.tokens.publish(shards[0].name)
        answer = {
            "name": item["name"],
            "shards": [shard.fields() for shard in shards],
            "longest": [max(group.n_tokens for group in part) for _, part in parts],
        }
        return [{"item": json.dumps(answer)}]


def _write(
    tokens: Folder, names: Sequence[str], map_tasks: MapTasks
) -> dict[str, list[tuple[Shard, int]]]:
    """Write the planned files; returns the shards of each, with the tokens of the longest group."""
    answers = map_tasks([{"name": name} for name in names], _WritePlanned(tokens))
    return {
        answer["name"]: [
            (Shard(**fields), longest)
            for fields, longest in zip(answer["shards"], answer["longest"], strict=True)
        ]
        for answer in answers
    }


def rewrite_part(
    request: IngestRequest,
    tokens: Folder,
    summaries: Sequence[Mapping[str, Any]],
    dropped: Sequence[Any],
    part: str,
    map_tasks: MapTasks,
) -> tuple[tuple[Shard, ...], int]:
    """Rewrite one part (`shard` or `held_shard`) of a token set without dropped pairs.

    With `group_by_prompt`, pairs of one prompt are grouped across all sources; otherwise files
    without a dropped pair stay as they are, and shards keep their order.

    Returns:
        The shards in order, and the number of tokens of the longest group.
    """
    (tokens / PLANS).make()
    if request.group_by_prompt:
        names = list(_plan_groups(tokens, summaries, dropped, part, request.shard_rows))
        written = _write(tokens, names, map_tasks)
        found = [shard for name in names for shard in written[name]]
    else:
        found = _without_dropped(tokens, summaries, dropped, part, map_tasks)
    tokens.remove(PLANS)
    return tuple(shard for shard, _ in found), max((longest for _, longest in found), default=0)


@dataclass(frozen=True)
class _Members:
    """The pairs of one part of a chunk that are kept.

    Args:
        name: file of its shard.
        source: of its pairs.
        rows: of the pairs in the file.
        keys: `group_keys` of `PairStats`.
    """

    name: str
    source: int
    rows: Rows
    keys: npt.NDArray[np.uint64]


def _members(
    tokens: Folder, summaries: Sequence[Mapping[str, Any]], dropped: Sequence[Any], part: str
) -> Iterator[_Members | None]:
    """For every summary the pairs of `shard` or `held_shard`; None where it has no such shard."""
    each = zip(summaries, dropped, strict=True)
    for name, members in itertools.groupby(each, key=lambda entry: entry[0]["name"]):
        keys, held = load_columns(tokens, name, ["group_keys", "held"])
        for summary, mask in members:
            shard, first = summary[part], summary["first_pair"]
            if not shard:
                yield None
                continue
            pairs = slice(first, first + summary["n_pairs"])
            side = held[pairs] if part == "held_shard" else ~held[pairs]
            kept = ~mask[side]
            rows = shard.get("first_group", 0) + np.flatnonzero(kept)
            yield _Members(shard["name"], summary["source"], rows, keys[pairs][side][kept])


def _without_dropped(
    tokens: Folder,
    summaries: Sequence[Mapping[str, Any]],
    dropped: Sequence[Any],
    part: str,
    map_tasks: MapTasks,
) -> list[tuple[Shard, int]]:
    """Write files again of which a pair is dropped."""
    changed: dict[str, list[_Members]] = defaultdict(list)
    lost: set[str] = set()
    found: list[tuple[Shard, int] | str] = []
    every = _members(tokens, summaries, dropped, part)
    for name, entries in itertools.groupby(
        zip(summaries, every, strict=True), key=lambda entry: entry[0]["name"]
    ):
        parts = [(Shard(**summary[part]), summary, m) for summary, m in entries if m is not None]
        if all(len(m.rows) == shard.n_groups for shard, _, m in parts):
            found += [(shard, summary["longest_group_tokens"]) for shard, summary, _ in parts]
            continue
        members = [m for *_, m in parts if len(m.rows)]
        new = f"{part}-kept-{name}"
        found.append(new)
        if members:
            _save_plan(tokens, new, members)
            changed[new] = members
        else:
            lost.add(new)
        del parts, members
    written = _write(tokens, list(changed), map_tasks) if changed else {}
    shards: list[tuple[Shard, int]] = []
    for entry in found:
        if not isinstance(entry, str):
            shards.append(entry)
        elif entry not in lost:
            shards += written[entry]
    return shards


def _save_plan(tokens: Folder, name: str, members: Sequence[_Members]) -> None:
    """Plan a file with a shard for each of `members`, whose pairs are apart."""
    rows = np.concatenate([m.rows for m in members])
    _Plan(
        names=np.array([members[0].name]),
        files=np.zeros(len(rows), np.int64),
        rows=rows,
        groups=np.ones(len(rows), np.int64),
        shards=np.array([len(m.rows) for m in members]),
        sources=np.array([m.source for m in members]),
    ).save(tokens, name)


def _plan_groups(
    tokens: Folder,
    summaries: Sequence[Mapping[str, Any]],
    dropped: Sequence[Any],
    part: str,
    shard_groups: int,
) -> Iterator[str]:
    """Plan a shard for every `shard_groups` groups, in the order in which keys first occur.

    Memory is about 5 bytes a pair: for each pair whether it is the first of its group, and the
    number of the group if so.
    """
    n_pairs = sum(summary["n_pairs"] for summary in summaries)
    names: list[str] = []
    with closing(Partitions(n_pairs, tokens.path)) as by_key:
        n_members = 0
        for members in _members(tokens, summaries, dropped, part):
            if members is None or not len(members.rows):
                continue
            if not names or names[-1] != members.name:
                names.append(members.name)
            numbered = np.arange(n_members, n_members + len(members.rows))
            n_members += len(numbered)
            located = ((len(names) - 1) << 32) + members.rows
            by_key.add(by_key.of_hashes(members.keys), members.keys, numbered, located)
        is_first = np.zeros(n_members, bool)
        for keys, order, _ in by_key.read(3):
            is_first[order[np.unique(keys, return_index=True)[1]]] = True
        numbers = np.cumsum(is_first, dtype=np.uint32)  # from 1, at the first pair of a group
        del is_first
        n_groups = int(numbers[-1]) if n_members else 0
        with closing(Partitions(n_members, tokens.path)) as by_group:
            width = max(1, -(-n_groups // (by_group.n_parts * shard_groups))) * shard_groups
            for keys, order, place in by_key.read(3):
                _, firsts, which = np.unique(keys, return_index=True, return_inverse=True)
                group = numbers[order[firsts]][which.reshape(-1)].astype(np.int64) - 1
                by_group.add(group // width, group, order, place)
            del numbers
            n_written = 0
            for number, order, place in by_group.read(3):
                ordered = np.lexsort((order, number))
                place = place[ordered]
                firsts = np.flatnonzero(np.diff(number[ordered].astype(np.int64), prepend=-1))
                ends = np.append(firsts, len(place))
                for start in range(0, len(firsts), shard_groups):
                    groups = ends[start : start + shard_groups + 1]
                    plan = _group_plan(names, place[groups[0] : groups[-1]], np.diff(groups))
                    name = f"{part}-prompts-{n_written:06d}"
                    plan.save(tokens, name)
                    n_written += 1
                    yield name


def _group_plan(names: Sequence[str], place: npt.NDArray[np.uint64], groups: Rows) -> _Plan:
    """A plan of one shard, from the places of its pairs."""
    files, which = np.unique((place >> np.uint64(32)).astype(np.int64), return_inverse=True)
    return _Plan(
        names=np.array([names[index] for index in files.tolist()]),
        files=which.reshape(-1),
        rows=(place & np.uint64(0xFFFFFFFF)).astype(np.int64),
        groups=groups,
        shards=np.array([len(groups)]),
        sources=np.array([-1]),
    )
