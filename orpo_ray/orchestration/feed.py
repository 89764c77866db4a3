"""Ray Train's feed: token sets become one stateless stream a rank; on the controller's node."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray.data
from ray.train import DataConfig

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.dataset.order import Order
from orpo_ray.dataset.shards import TokenSet
from orpo_ray.dataset.stream import BatchPlan, TokenStream


@dataclass(frozen=True)
class FeedPlan:
    """One token set with its order and its batches, before it is known how many ranks there are."""

    token_set: TokenSet
    order: Order
    plan: BatchPlan

    def stream(self, rank: int, world_size: int) -> TokenStream:
        """The stream of one rank."""
        return TokenStream(self.token_set, self.order, self.plan, rank, world_size)

    def shard_list(self) -> "ray.data.Dataset":
        """The token shards as a dataset, a row a shard: what Ray Train is shown of the data."""
        shards = [vars(shard) for shard in self.token_set.shards]
        return ray.data.from_arrow(pa.Table.from_pylist(shards))


class PlannedFeed(DataConfig):  # type: ignore[misc]
    """Hands each rank its stream from the plan, anew for every worker group that starts.

    Ray calls `configure` with the actual number of workers, also after a failure or a resize; the
    order does not depend on it, so global batch k is the same set of rows each time.
    """

    def __init__(self, plans: Mapping[str, FeedPlan]) -> None:
        super().__init__()
        self._plans = dict(plans)

    def configure(
        self,
        datasets: dict[str, Any],
        world_size: int,
        worker_handles: list[Any] | None,
        worker_node_ids: list[str] | None,
        **_: Any,
    ) -> list[dict[str, TokenStream]]:
        """One stream a rank for every dataset asked for."""
        return [
            {name: self._plans[name].stream(rank, world_size) for name in datasets}
            for rank in range(world_size)
        ]


def train_plan(
    config: ORPOConfig, token_set: TokenSet, source_weights: Sequence[float]
) -> FeedPlan:
    """The order and batches of training.

    Args:
        config: of the run.
        token_set: of the training pairs.
        source_weights: of every source file of it.
    """
    data = config.data
    weights: tuple[float, ...] = ()
    if set(source_weights) - {1.0}:
        weights = tuple(source_weights[shard.source] for shard in token_set.shards)
    order = dataclasses.replace(_order(config, token_set, data.shuffle), weights=weights)
    return FeedPlan(
        token_set=token_set,
        order=order,
        plan=dataclasses.replace(
            _batches(config, config.pairs_per_step, config.microbatch_tokens),
            chosen_alone=config.orpo.chosen_alone,
        ),
    )


def eval_plan(config: ORPOConfig, token_set: TokenSet, groups_per_worker: int) -> FeedPlan:
    """The order and batches of an evaluation: file order, once."""
    return FeedPlan(
        token_set=token_set,
        order=_order(config, token_set, shuffle=False),
        plan=_batches(
            config, groups_per_worker * config.ray.max_workers, config.eval_microbatch_tokens
        ),
    )


def _order(config: ORPOConfig, token_set: TokenSet, shuffle: bool) -> Order:
    seed = config.train.seed if config.train.data_seed is None else config.train.data_seed
    return Order(
        shard_lengths=tuple(shard.n_groups for shard in token_set.shards),
        window_shards=config.data.shuffle_window_shards,
        seed=seed,
        shuffle=shuffle,
    )


def _batches(config: ORPOConfig, batch_groups: int, budget_tokens: int) -> BatchPlan:
    return BatchPlan(
        batch_groups=batch_groups,
        budget_tokens=budget_tokens,
        chunk_tokens=config.train.head_chunk(),  # a worker knows its device
        prompt_counts=config.orpo.prompt_counts,
    )
