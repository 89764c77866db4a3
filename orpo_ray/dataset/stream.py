"""The feed of one rank: global batches in order, shared out, packed, and read ahead of time."""

import itertools
import queue
import threading
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

import xxhash

from orpo_ray.dataset.order import Order
from orpo_ray.dataset.packing import PackedRow, balanced_bins, nll_tokens, pack
from orpo_ray.dataset.shards import TokenSet, read_shard
from orpo_ray.preference.groups import PromptGroup, RowId, without_rows

GroupLocation = tuple[int, int]


@dataclass(frozen=True)
class StepBatch:
    """One rank's share of a global batch, with what every rank knows of the whole.

    Args:
        step: optimizer steps before this one.
        epoch: passes over the data before this one.
        rows: this rank's microbatches, as many as every other rank's.
        n_nll_tokens: NLL tokens of the global batch.
        n_pairs: pairs of the global batch.
        n_tokens: packed tokens of the global batch.
        row_ids: source rows of the global batch, in the order of the epoch.
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
    """How batches are cut from the order; the same on every rank and at every world size.

    Args:
        batch_groups: prompt groups of a global batch.
        budget_tokens: tokens that one microbatch may hold.
        chunk_tokens: positions that the LM head projects at once.
        prompt_counts: whether the NLL is over the prompt as well.
    """

    batch_groups: int
    budget_tokens: int
    chunk_tokens: int
    prompt_counts: bool


@dataclass(frozen=True)
class TokenStream:
    """Everything a rank needs to derive its batches; small, picklable and without state."""

    token_set: TokenSet
    order: Order
    plan: BatchPlan
    rank: int
    world_size: int

    @property
    def data_digest(self) -> str:
        """Equal where the same pairs are trained as often as one another."""
        pairs, weights = self.token_set.digest, self.order.weights
        return xxhash.xxh3_128_hexdigest(f"{pairs} {weights}".encode()) if weights else pairs

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in one pass over the data; the last one may be smaller."""
        return self.order.n_batches(self.plan.batch_groups)

    def position(self, step: int) -> dict[str, int]:
        """Where in the data training stands after so many optimizer steps, for a manifest."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        return {
            "epoch": epoch,
            "batch_of_epoch": batch,
            "global_batch_pairs": self.plan.batch_groups,
        }

    def batches(self, first_step: int, n_steps: int) -> Iterator[StepBatch]:
        """The batches of steps `first_step` to `n_steps` (exclusive), packed in a thread ahead."""
        return _prefetch(self._batches(first_step, n_steps))

    def batch_without(self, step: int, rows: Set[RowId]) -> StepBatch:
        """The batch of one step without some source rows; it may be empty."""
        shards = _ShardCache(self.token_set, keep=2 * self.order.window_shards + 1)
        epoch, batch = divmod(step, self.steps_per_epoch)
        places = self.order.epoch(epoch, batch * self.plan.batch_groups)
        members = itertools.islice(places, self.plan.batch_groups)
        kept = (without_rows(shards.group(place), rows) for place in members)
        return self._batch(step, epoch, [group for group in kept if group is not None])

    def first_groups(self, n_groups: int) -> list[PromptGroup]:
        """The first few groups of the first epoch; the same on every rank."""
        shards = _ShardCache(self.token_set, keep=2 * self.order.window_shards + 1)
        places = itertools.islice(self.order.epoch(0, 0), n_groups)
        return [shards.group(place) for place in places]

    def sample(self, n_groups: int) -> PackedRow:
        """The same as one row."""
        groups = self.first_groups(n_groups)
        return pack(groups, self.plan.chunk_tokens, self.plan.prompt_counts)

    def _batches(self, first_step: int, n_steps: int) -> Iterator[StepBatch]:
        shards = _ShardCache(self.token_set, keep=2 * self.order.window_shards + 1)
        step = first_step
        while step < n_steps:
            epoch, batch = divmod(step, self.steps_per_epoch)
            places = self.order.epoch(epoch, batch * self.plan.batch_groups)
            for members in _batched(places, self.plan.batch_groups):
                if step == n_steps:
                    return
                yield self._batch(step, epoch, [shards.group(place) for place in members])
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
    """The last few shards, read whole: what bounds the feed's memory."""

    def __init__(self, token_set: TokenSet, keep: int) -> None:
        self._token_set = token_set
        self._keep = keep
        self._open: dict[int, list[PromptGroup]] = {}

    def group(self, place: GroupLocation) -> PromptGroup:
        """One group by (shard, row)."""
        shard, row = place
        if shard not in self._open:
            if len(self._open) >= self._keep:
                del self._open[next(iter(self._open))]
            path = Path(self._token_set.directory) / self._token_set.shards[shard].name
            self._open[shard] = read_shard(str(path))
        return self._open[shard][row]


def _batched(places: Iterator[GroupLocation], size: int) -> Iterator[list[GroupLocation]]:
    """Consecutive lists of `size` places; the last one may be shorter."""
    batch: list[GroupLocation] = []
    for place in places:
        batch.append(place)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _prefetch(batches: Iterator[StepBatch], depth: int = 4) -> Iterator[StepBatch]:
    """Run an iterator in a thread, `depth` items ahead; its error is raised where it is read."""
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
