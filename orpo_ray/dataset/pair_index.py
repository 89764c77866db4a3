"""Hashes and lengths of every pair of a shard; written by data tasks, read by the driver.

They let the driver find duplicates, overlaps and shared prompts without reading tokens.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from orpo_ray.preference.groups import PromptGroup
from orpo_ray.preference.templates import PairText
from orpo_ray.storage.folder import Folder

STATS = "stats"
_SCALE = float(1 << 64)
Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class PairStats:
    """Arrays with one entry for every kept pair of some shards, in order; keys are XXH3-64 hashes.

    Args:
        sources: index of the source file.
        rows: source row number, from 0.
        prompt_keys: hash of the prompt before templating (see `Record.prompt_key`).
        pair_keys: hash of the three rendered texts.
        swapped_keys: what `pair_keys` would be with chosen and rejected swapped; no pair's for one
            answer.
        group_keys: hash of the prompt's token ids after truncation.
        lengths: (pairs, 3), number of tokens of prompt, chosen and rejected; 0 for none.
        held: whether the pair is held out of training.
        subsets: value of the row's subset column, "" without one.
    """

    sources: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int64]
    prompt_keys: Keys
    pair_keys: Keys
    swapped_keys: Keys
    group_keys: Keys
    lengths: npt.NDArray[np.int32]
    held: npt.NDArray[np.bool_]
    subsets: npt.NDArray[np.str_]

    def save(self, tokens: Folder, name: str) -> None:
        """Write the stats of the file of shards `name` atomically."""
        with tokens.replacing(f"{STATS}/{name}.npz") as path, path.open("wb") as file:
            np.savez(file, **vars(self))

    def part(self, first: int, n_pairs: int) -> "PairStats":
        """The stats of some of the pairs, without copying."""
        return PairStats(*(a[first : first + n_pairs] for a in vars(self).values()))

    @staticmethod
    def together(parts: Sequence["PairStats"]) -> "PairStats":
        """The stats of several shards."""
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return PairStats(*map(np.concatenate, columns))

    @staticmethod
    def load(tokens: Folder, name: str) -> "PairStats":
        """Read the stats of the file of shards `name`."""
        return PairStats(*load_columns(tokens, name, [f.name for f in fields(PairStats)]))

    @staticmethod
    def names(tokens: Folder) -> list[str]:
        """List the files of shards that have stats, in the order of their first source and row."""
        found = [path.stem for path in (tokens / STATS).fetch().path.glob("*.npz")]
        return sorted(found, key=lambda name: [int(part) for part in name.split("-")])


def load_columns(tokens: Folder, name: str, columns: Sequence[str]) -> list[Any]:
    """Read some of the arrays of the stats of `name`."""
    with np.load(tokens.fetch_file(f"{STATS}/{name}.npz", once=True)) as arrays:
        return [arrays[column] for column in columns]


def iter_columns(tokens: Folder, *columns: str) -> Iterator[list[Any]]:
    """Some of the arrays of `PairStats`, a file of stats after the other."""
    return (load_columns(tokens, name, columns) for name in PairStats.names(tokens))


def load_keys(tokens: Folder, name: str) -> Any:
    """Concatenate one array of keys (a field of `PairStats`) over all shards."""
    parts = [keys for (keys,) in iter_columns(tokens, name)]
    return np.concatenate([np.empty(0, np.uint64), *parts])


def iter_stats(
    tokens: Folder, summaries: Sequence[dict[str, Any]]
) -> Iterator[tuple[list[dict[str, Any]], PairStats]]:
    """Load the stats of every file of shards in order, with the summaries of its chunks."""
    for name, members in itertools.groupby(summaries, key=lambda summary: str(summary["name"])):
        yield list(members), PairStats.load(tokens, name)


def are_among(keys: Keys, ordered: Keys) -> npt.NDArray[np.bool_]:
    """Whether each key is one of `ordered`, which must be sorted; `np.isin` would sort it again."""
    if not len(ordered):
        return np.zeros(len(keys), dtype=bool)
    places = np.minimum(np.searchsorted(ordered, keys), len(ordered) - 1)
    found: npt.NDArray[np.bool_] = ordered[places] == keys
    return found


@dataclass
class PairStatsBuilder:
    """Collects the pairs of a shard, and their `PairStats`, one pair at a time.

    Args:
        held_share: share of prompts to hold out, in [0, 1]. Prompts are selected by their hash, so
            the selection does not depend on the rest of the data.
    """

    held_share: float
    groups: list[PromptGroup] = field(default_factory=list)
    keys: list[tuple[int, int, int]] = field(default_factory=list)
    subsets: list[str] = field(default_factory=list)

    def add(self, group: PromptGroup, text: PairText, prompt: str, subset: str = "") -> None:
        """Add one plain pair; `prompt` is its `Record.prompt_key`."""
        texts = (text.prompt, text.chosen, text.rejected)
        of_prompt, of_chosen, of_rejected = (xxhash.xxh3_64_digest(part.encode()) for part in texts)
        pair_key = xxhash.xxh3_64_intdigest(of_prompt + of_chosen + of_rejected)
        is_alone = of_chosen == of_rejected  # which no pair contradicts
        swapped = of_prompt if is_alone else of_prompt + of_rejected + of_chosen
        swapped_key = xxhash.xxh3_64_intdigest(swapped)
        self.groups.append(group)
        self.keys.append((_hash(prompt), pair_key, swapped_key))
        self.subsets.append(subset)

    def _held(self) -> list[bool]:
        return [key / _SCALE < self.held_share for key, *_ in self.keys]

    def part(self, held: bool) -> list[PromptGroup]:
        """Return the pairs that are held out, or those that are not."""
        return [group for group, out in zip(self.groups, self._held(), strict=True) if out == held]

    def arrays(self) -> PairStats:
        """Return the stats of all added pairs."""
        keys = np.array(self.keys, dtype=np.uint64).reshape(-1, 3)
        lengths = [
            [len(group.prompt), *map(len, group.completions), 0][:3] for group in self.groups
        ]
        return PairStats(
            sources=np.array([group.row_ids[0].source for group in self.groups], dtype=np.int32),
            rows=np.array([group.row_ids[0].row for group in self.groups], dtype=np.int64),
            prompt_keys=keys[:, 0],
            pair_keys=keys[:, 1],
            swapped_keys=keys[:, 2],
            group_keys=np.array(
                [xxhash.xxh3_64_intdigest(group.prompt.tobytes()) for group in self.groups],
                dtype=np.uint64,
            ),
            lengths=np.array(lengths, dtype=np.int32).reshape(-1, 3),
            held=np.array(self._held(), dtype=bool),
            subsets=np.array(self.subsets, dtype=np.str_),
        )


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())
