"""The stream of batches of one rank; on training workers.

Every rank reads each global batch, balances it over ranks and packs its share, in a thread that
runs ahead of training.
"""

import itertools
import queue
import threading
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any

import xxhash

from orpo_ray.dataset.order import Order
from orpo_ray.dataset.packing import PackedRow, balanced_bins, nll_tokens, pack
from orpo_ray.dataset.shards import Shard, TokenSet, to_groups
from orpo_ray.preference.groups import PromptGroup, RowId, chosen_alone, without_rows

_TABLES_BYTES = 64 << 20
GroupLocation = tuple[int, int]
"""Index of a shard and of a group (a row of its table) in it."""


@dataclass(frozen=True)
class StepBatch:
    """One rank's share of a global batch, with the counts of the whole batch.

    The counts are the divisors of the loss, so ranks need not exchange them.

    Args:
        step: optimizer step, from 0.
        epoch: epoch, from 0.
        rows: microbatches of this rank; every rank has the same number.
        n_nll_tokens: NLL tokens of the global batch, once for every pair that counts them.
        n_pairs: pairs of the global batch.
        n_tokens: packed tokens of the global batch.
        row_ids: source rows of the pairs of the global batch, in order.
    """

    step: int
    epoch: int
    rows: tuple[PackedRow, ...]
    n_nll_tokens: int
    n_pairs: int
    n_tokens: int
    row_ids: tuple[RowId, ...]


@dataclass(frozen=True)
class BatchPlan:
    """Sizes of batches, microbatches and chunks; the same on every rank.

    Args:
        batch_groups: prompt groups per global batch.
        budget_tokens: maximum number of tokens per microbatch; a longer group is one by itself.
        chunk_tokens: maximum number of positions that the LM head projects at once.
        prompt_counts: whether the NLL includes prompt tokens (`nll_scope: all`).
        chosen_alone: whether rejected completions are left out.
    """

    batch_groups: int
    budget_tokens: int
    chunk_tokens: int
    prompt_counts: bool
    chosen_alone: bool = False


@dataclass(frozen=True)
class TokenStream:
    """Derives the batches of one rank from token set and order; stateless and picklable."""

    token_set: TokenSet
    order: Order
    plan: BatchPlan
    rank: int
    world_size: int

    @property
    def data_digest(self) -> str:
        """Digest of the training data: of the token set and, if there are any, the weights."""
        pairs, weights = self.token_set.digest, self.order.weights
        return xxhash.xxh3_128_hexdigest(f"{pairs} {weights}".encode()) if weights else pairs

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps per epoch; the last batch may be smaller."""
        return self.order.n_batches(self.plan.batch_groups)

    def position(self, step: int) -> dict[str, int]:
        """Position in the data after `step` optimizer steps, for the manifest of a checkpoint."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        return {
            "epoch": epoch,
            "batch_of_epoch": batch,
            "global_batch_pairs": self.plan.batch_groups,
        }

    def batches(self, first_step: int, n_steps: int) -> Iterator[StepBatch]:
        """Yield the batches of steps `first_step` to `n_steps` (exclusive), prefetching them."""
        return _prefetch(self._batches(first_step, n_steps))

    def batch_without(self, step: int, rows: Set[RowId]) -> StepBatch:
        """Return the batch of one step without the given source rows; it may be empty."""
        shards = self._shards()
        epoch, batch = divmod(step, self.steps_per_epoch)
        locations = self.order.epoch(epoch, batch * self.plan.batch_groups)
        members = itertools.islice(locations, self.plan.batch_groups)
        kept = (without_rows(shards.group(location), rows) for location in members)
        return self._batch(step, epoch, [group for group in kept if group is not None])

    def first_groups(self, n_groups: int) -> list[PromptGroup]:
        """Return the first groups of epoch 0; the same on every rank."""
        shards = self._shards()
        locations = itertools.islice(self.order.epoch(0, 0), n_groups)
        return [shards.group(location) for location in locations]

    def sample(self, n_groups: int) -> PackedRow:
        """Pack the first groups of epoch 0 into one row; the same on every rank."""
        groups = self.first_groups(n_groups)
        return pack(groups, self.plan.chunk_tokens, self.plan.prompt_counts)

    def _shards(self) -> "_ShardCache":
        keep = 2 * self.order.window_shards + 1
        return _ShardCache(self.token_set, keep, self.plan.chosen_alone)

    def _batches(self, first_step: int, n_steps: int) -> Iterator[StepBatch]:
        shards = self._shards()
        step = first_step
        while step < n_steps:
            epoch, batch = divmod(step, self.steps_per_epoch)
            locations = self.order.epoch(epoch, batch * self.plan.batch_groups)
            for members in _batched(locations, self.plan.batch_groups):
                if step == n_steps:
                    return
                yield self._batch(step, epoch, [shards.group(location) for location in members])
                step += 1

    def _batch(self, step: int, epoch: int, groups: list[PromptGroup]) -> StepBatch:
        plan = self.plan
        sizes = [group.n_tokens for group in groups]
        bins = balanced_bins(sizes, self.world_size, plan.budget_tokens)[self.rank]
        return StepBatch(
            step=step,
            epoch=epoch,
            rows=tuple(
                pack([groups[i] for i in members], plan.chunk_tokens, plan.prompt_counts)
                for members in bins
            ),
            n_nll_tokens=sum(nll_tokens(group, plan.prompt_counts) for group in groups),
            n_pairs=sum(len(group.pairs) for group in groups),
            n_tokens=sum(sizes),
            row_ids=tuple(row_id for group in groups for row_id in group.row_ids),
        )


class _ShardCache:
    """Keeps the most recently opened shards in memory, at most `keep`, evicting in FIFO order.

    Of files that hold several shards, which are small, the tables are kept as well.
    """

    def __init__(self, token_set: TokenSet, keep: int, alone: bool) -> None:
        self._token_set = token_set
        self._keep = keep
        self._alone = alone
        self._open: dict[int, list[PromptGroup]] = {}
        self._shards_of = Counter(shard.name for shard in token_set.shards)
        self._tables: dict[str, Any] = {}

    def group(self, location: GroupLocation) -> PromptGroup:
        """Return one group, reading its shard if it is not in memory."""
        shard, row = location
        if shard not in self._open:
            if len(self._open) >= self._keep:
                del self._open[next(iter(self._open))]
            groups = self._groups(self._token_set.shards[shard])
            self._open[shard] = list(map(chosen_alone, groups)) if self._alone else groups
        return self._open[shard][row]

    def _groups(self, shard: Shard) -> list[PromptGroup]:
        if self._shards_of[shard.name] == 1:
            return self._token_set.groups(shard)
        if shard.name not in self._tables:
            while sum(table.nbytes for table in self._tables.values()) > _TABLES_BYTES:
                del self._tables[next(iter(self._tables))]
            self._tables[shard.name] = self._token_set.table(shard.name)
        return to_groups(self._tables[shard.name].slice(shard.first_group, shard.n_groups))


def _batched(locations: Iterator[GroupLocation], size: int) -> Iterator[list[GroupLocation]]:
    """Batch locations into lists of `size`; the last one may be shorter."""
    batch: list[GroupLocation] = []
    for location in locations:
        batch.append(location)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _prefetch(batches: Iterator[StepBatch], depth: int = 4) -> Iterator[StepBatch]:
    """Run an iterator in a thread, up to `depth` items ahead; exceptions are raised here."""
    ready: queue.Queue[StepBatch | BaseException | None] = queue.Queue(depth)
    abandoned = threading.Event()

    def put(item: StepBatch | BaseException | None) -> None:
        while not abandoned.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue
        return None

    def work() -> None:
        try:
            for batch in batches:
                put(batch)
                if abandoned.is_set():
                    return
        except BaseException as error:
            put(error)
        else:
            put(None)

    thread = threading.Thread(target=work, name="orpo-feed", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        abandoned.set()
        thread.join()
