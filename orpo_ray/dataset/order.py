"""The order of training: a pure function of seed, epoch and shard lengths, enterable anywhere."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_EVERY_EPOCH = 2**63  # in place of an epoch: what is the same in all of them


@dataclass(frozen=True)
class Order:
    """How the groups of a token set follow one another.

    Shards are permuted, then rows are shuffled inside windows of consecutive shards, anew each
    epoch. Nothing depends on the number of workers.

    With weights, every epoch takes from each shard as many groups as its length times its weight
    (rounded, one at least). Which ones goes round: after any number of epochs no group of a shard
    was taken more than once oftener than another.

    Args:
        shard_lengths: groups in every shard.
        window_shards: shards whose rows are shuffled together.
        seed: of the permutations.
        shuffle: False keeps shards and rows as they are.
        weights: of every shard, how often its groups are taken in an epoch; none: once.
    """

    shard_lengths: tuple[int, ...]
    window_shards: int
    seed: int
    shuffle: bool
    weights: tuple[float, ...] = ()

    @property
    def n_groups(self) -> int:
        """Groups in an epoch, each as often as it is taken."""
        return sum(map(self._groups_per_epoch, range(len(self.shard_lengths))))

    def _groups_per_epoch(self, shard: int) -> int:
        """Groups that an epoch takes from one shard."""
        length = self.shard_lengths[shard]
        return max(1, round(length * self.weights[shard])) if self.weights else length

    def n_batches(self, batch_groups: int) -> int:
        """Global batches in an epoch; the last one may be smaller."""
        return -(-self.n_groups // batch_groups)

    def windows(self, epoch: int) -> list[tuple[int, ...]]:
        """The shards of every window of an epoch, in order."""
        n_shards, width = len(self.shard_lengths), self.window_shards
        shards = _permutation(self.seed, epoch, 0, n_shards) if self.shuffle else range(n_shards)
        return [tuple(shards[first : first + width]) for first in range(0, n_shards, width)]

    def epoch(self, epoch: int, first_group: int = 0) -> Iterator[tuple[int, int]]:
        """(shard, row) of every group of an epoch, from the `first_group`-th on.

        Windows before the first wanted group are skipped without being looked at.
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
        """The groups of one shard that an epoch takes, in file order.

        A group at place p of a fixed permutation of n is taken floor(((e+1) k + p) / n) -
        floor((e k + p) / n) times in epoch e, where k are taken: by Hermite's identity k in all.
        """
        length, taken = self.shard_lengths[shard], self._groups_per_epoch(shard)
        if taken == length:
            return list(range(length))
        places = np.empty(length, dtype=np.int64)
        places[_permutation(self.seed, _EVERY_EPOCH, shard, length)] = np.arange(length)
        times = ((epoch + 1) * taken + places) // length - (epoch * taken + places) // length
        return [int(row) for row in np.repeat(np.arange(length), times)]


def _permutation(seed: int, epoch: int, stream: int, length: int) -> list[int]:
    """Sort raw random bits: unlike `Generator.permutation` that is the same in every numpy."""
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch, stream]))
    return [int(i) for i in bits.random_raw(length).argsort(kind="stable")]
