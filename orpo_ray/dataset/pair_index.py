"""Hashes and lengths of every pair: for duplicates, overlaps, groups, and what reports say."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from orpo_ray.preference.groups import PromptGroup
from orpo_ray.preference.templates import PairText
from orpo_ray.storage.files import replacing
from orpo_ray.storage.mirror import fetch_folder, fetch_once, publish

STATS = "stats"
_SCALE = float(1 << 64)
Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class PairStats:
    """Arrays with an entry for every kept pair of some rows, in their order.

    Hashes are XXH3-64.

    Args:
        rows: source row, from 0.
        prompt_keys: of the prompt as its source has it; of the row where it has none.
        pair_keys: of all three texts.
        group_keys: of the prompt's tokens, cut as they are.
        lengths: tokens of prompt, chosen and rejected, [pairs, 3].
        held: whether the pair is held out.
        subsets: what the row says it belongs to; empty where it says nothing.
    """

    rows: npt.NDArray[np.int64]
    prompt_keys: Keys
    pair_keys: Keys
    group_keys: Keys
    lengths: npt.NDArray[np.int32]
    held: npt.NDArray[np.bool_]
    subsets: npt.NDArray[np.str_]

    def save(self, directory: str, name: str) -> None:
        """Write atomically, as the stats of one shard of a token set."""
        path = Path(directory, STATS, f"{name}.npz")
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **vars(self))
        publish(path)

    @staticmethod
    def load(directory: str, name: str) -> "PairStats":
        """Read what `save` wrote."""
        with np.load(fetch_once(Path(directory, STATS, f"{name}.npz"))) as arrays:
            return PairStats(**arrays)

    @staticmethod
    def names(directory: str) -> list[str]:
        """Those under which `save` wrote, in no order; not what a killed task left half written."""
        return [path.stem for path in fetch_folder(Path(directory, STATS)).glob("*.npz")]


@dataclass
class PairStatsBuilder:
    """Collects what `PairStats` holds, pair by pair.

    Args:
        held_share: prompts whose hash lies below it are held out, whatever else is in the data.
    """

    held_share: float
    groups: list[PromptGroup] = field(default_factory=list)
    keys: list[tuple[int, int]] = field(default_factory=list)
    subsets: list[str] = field(default_factory=list)

    def add(self, group: PromptGroup, text: PairText, prompt: str, subset: str = "") -> None:
        """One plain pair; `prompt` is equal where prompts are, whatever templates make of them."""
        parts = (text.prompt, text.chosen, text.rejected)
        lengths = ",".join(str(len(part)) for part in parts)  # keeps the parts apart
        pair_key = _hash("".join((lengths, *parts)))
        self.groups.append(group)
        self.keys.append((_hash(prompt), pair_key))
        self.subsets.append(subset)

    def _held(self) -> list[bool]:
        return [key / _SCALE < self.held_share for key, _ in self.keys]

    def part(self, held: bool) -> list[PromptGroup]:
        """The pairs that are held out, or the others."""
        return [group for group, out in zip(self.groups, self._held(), strict=True) if out == held]

    def arrays(self) -> PairStats:
        """Everything that was added."""
        keys = np.array(self.keys, dtype=np.uint64).reshape(-1, 2)
        lengths = [[len(group.prompt), *map(len, group.completions)] for group in self.groups]
        return PairStats(
            rows=np.array([group.row_ids[0].row for group in self.groups], dtype=np.int64),
            prompt_keys=keys[:, 0],
            pair_keys=keys[:, 1],
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
