"""The order of training: a pure function of seed, epoch and shard lengths, enterable anywhere."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Order:
    """How the groups of a token set follow one another.

    Shards are permuted, then rows are shuffled inside windows of consecutive shards, anew each
    epoch. Nothing depends on the number of workers.

    Args:
        shard_lengths: groups in every shard.
        window_shards: shards whose rows are shuffled together.
        seed: of the permutations.
        shuffle: False keeps shards and rows as they are.
    """

    shard_lengths: tuple[int, ...]
    window_shards: int
    seed: int
    shuffle: bool

    @property
    def n_groups(self) -> int:
        """Groups in an epoch."""
        return sum(self.shard_lengths)

    def n_batches(self, batch_groups: int) -> int:
        """Global batches in an epoch; the last one may be smaller."""
        return -(-self.n_groups // batch_groups)

    def windows(self, epoch: int) -> list[tuple[int, ...]]:
        """The shards of every window of an epoch, in order."""
        n_shards, width = len(self.shard_lengths), self.window_shards
        shards = self._permutation(epoch, 0, n_shards) if self.shuffle else range(n_shards)
        return [tuple(shards[first : first + width]) for first in range(0, n_shards, width)]

    def epoch(self, epoch: int, first_group: int = 0) -> Iterator[tuple[int, int]]:
        """(shard, row) of every group of an epoch, from the `first_group`-th on.

        Windows before the first wanted group are skipped without being looked at.
        """
        passed = 0
        for index, window in enumerate(self.windows(epoch)):
            size = sum(self.shard_lengths[shard] for shard in window)
            if passed + size > first_group:
                yield from self._window_rows(epoch, index, window)[max(0, first_group - passed) :]
            passed += size

    def _window_rows(self, epoch: int, index: int, window: Sequence[int]) -> list[tuple[int, int]]:
        rows = [(shard, row) for shard in window for row in range(self.shard_lengths[shard])]
        if not self.shuffle:
            return rows
        return [rows[i] for i in self._permutation(epoch, 1 + index, len(rows))]

    def _permutation(self, epoch: int, stream: int, length: int) -> list[int]:
        """Sort raw random bits: unlike `Generator.permutation` that is the same in every numpy."""
        bits = np.random.Philox(np.random.SeedSequence([self.seed, epoch, stream]))
        return [int(i) for i in bits.random_raw(length).argsort(kind="stable")]
