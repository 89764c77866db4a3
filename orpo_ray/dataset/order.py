"""The order of groups in training, a pure function of the seed; on the driver and workers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_EVERY_EPOCH = 2**63  # stands for an epoch in seeds of permutations that all epochs share


@dataclass(frozen=True)
class Order:
    """The order in which the groups of a token set are trained on; random access by position.

    In each epoch the shards are permuted, then rows are shuffled within windows of consecutive
    shards. The order does not depend on the number of workers.

    With weights, every epoch takes length times weight groups (rounded, at least one) from each
    shard. It takes them in turn: after any number of epochs, the counts of two groups of one shard
    differ by at most one.

    Args:
        shard_lengths: number of groups of every shard.
        window_shards: number of shards whose rows are shuffled together.
        seed: seed of all permutations.
        shuffle: False keeps the order of shards and rows.
        weights: for every shard, the average number of times that an epoch takes each of its
            groups; empty for once.
    """

    shard_lengths: tuple[int, ...]
    window_shards: int
    seed: int
    shuffle: bool
    weights: tuple[float, ...] = ()

    @property
    def n_groups(self) -> int:
        """Number of groups in an epoch, counting repeats."""
        return sum(map(self._groups_per_epoch, range(len(self.shard_lengths))))

    def _groups_per_epoch(self, shard: int) -> int:
        """Number of groups that an epoch takes from one shard."""
        length = self.shard_lengths[shard]
        return max(1, round(length * self.weights[shard])) if self.weights else length

    def n_batches(self, batch_groups: int) -> int:
        """Number of global batches in an epoch; the last one may be smaller."""
        return -(-self.n_groups // batch_groups)

    def windows(self, epoch: int) -> list[tuple[int, ...]]:
        """Return the shards of every window of an epoch, in order."""
        n_shards, width = len(self.shard_lengths), self.window_shards
        shards = _permutation(self.seed, epoch, 0, n_shards) if self.shuffle else range(n_shards)
        return [tuple(shards[first : first + width]) for first in range(0, n_shards, width)]

    def epoch(self, epoch: int, first_group: int = 0) -> Iterator[tuple[int, int]]:
        """Yield (shard, row) of every group of an epoch, starting at group `first_group`.

        Earlier windows are skipped without computing their permutation.
        """
        passed = 0
        for index, window in enumerate(self.windows(epoch)):
            size = sum(map(self._groups_per_epoch, window))
            if passed + size > first_group:
                yield from self._window_rows(epoch, index, window)[max(0, first_group - passed) :]
            passed += size

    def _window_rows(self, epoch: int, index: int, window: Sequence[int]) -> list[tuple[int, int]]:
        rows = [(shard, row) for shard in window for row in self._shard_rows(epoch, shard)]
        if not self.shuffle:
            return rows
        return [rows[i] for i in _permutation(self.seed, epoch, 1 + index, len(rows))]

    def _shard_rows(self, epoch: int, shard: int) -> list[int]:
        """Return the groups of one shard that an epoch takes, in file order.

        Of n groups an epoch takes k. The group at position p of a fixed permutation is taken
        floor(((e+1) k + p) / n) - floor((e k + p) / n) times in epoch e: k in all, by Hermite's
        identity.
        """
        length, taken = self.shard_lengths[shard], self._groups_per_epoch(shard)
        if taken == length:
            return list(range(length))
        positions = np.empty(length, dtype=np.int64)
        positions[_permutation(self.seed, _EVERY_EPOCH, shard, length)] = np.arange(length)
        times = ((epoch + 1) * taken + positions) // length - (epoch * taken + positions) // length
        return [int(row) for row in np.repeat(np.arange(length), times)]


def _permutation(seed: int, epoch: int, stream: int, length: int) -> list[int]:
    """Sort raw random bits, which are the same in every numpy, as `permutation` need not be."""
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch, stream]))
    return [int(i) for i in bits.random_raw(length).argsort(kind="stable")]
