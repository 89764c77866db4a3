"""The order of training."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_ray.dataset.order import Order

LENGTHS = (5, 1, 8, 3, 7, 2)


def order(**changes: object) -> Order:
    fields = {"shard_lengths": LENGTHS, "window_shards": 2, "seed": 7, "shuffle": True}
    return Order(**(fields | changes))


def test_an_epoch_has_every_group_exactly_once():
    everything = [(shard, row) for shard, length in enumerate(LENGTHS) for row in range(length)]
    for epoch in range(3):
        assert sorted(order().epoch(epoch)) == everything


def test_epochs_and_seeds_differ_and_repeat():
    first = list(order().epoch(0))
    assert first == list(order().epoch(0))
    assert first != list(order().epoch(1))
    assert first != list(order(seed=8).epoch(0))


def test_without_shuffle_the_files_order_is_kept():
    rows = list(order(shuffle=False).epoch(3))
    assert rows == sorted(rows)


@pytest.mark.parametrize("first", range(sum(LENGTHS) + 1))
def test_entering_anywhere_gives_the_rest_of_the_epoch(first):
    whole = list(order().epoch(2))
    assert list(order().epoch(2, first)) == whole[first:]


def test_rows_stay_inside_their_window():
    """6 shards in windows of 2: the first two windows' rows come before any other's."""
    plan = order()
    windows = plan.windows(0)
    assert sorted(itertools.chain(*windows)) == list(range(6))
    assert [len(window) for window in windows] == [2, 2, 2]
    met = [next(i for i, w in enumerate(windows) if shard in w) for shard, _ in plan.epoch(0)]
    assert met == sorted(met)


def test_the_permutation_is_pinned():
    """Raw Philox bits are specified, so this order must hold on every machine and numpy.

    Computed once with numpy 2.4; a change here would reorder every run that is resumed.
    """
    rows = list(order(shard_lengths=(4, 3), window_shards=2).epoch(0))
    assert rows == [(0, 0), (0, 3), (0, 2), (1, 0), (1, 1), (0, 1), (1, 2)]


def test_batches_round_up():
    """26 groups in batches of 8: 8 + 8 + 8 + 2."""
    assert order().n_batches(8) == 4


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    weights=st.lists(st.sampled_from([0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.3]), min_size=4, max_size=4),
    seed=st.integers(0, 5),
    epochs=st.integers(1, 7),
)
def test_weights_say_how_often_and_every_group_has_its_turn(
    lengths: list[int], weights: list[float], seed: int, epochs: int
) -> None:
    """Each epoch takes round(n w) of a shard, and no group was ever taken twice oftener."""
    order = Order(tuple(lengths), 2, seed, shuffle=True, weights=tuple(weights[: len(lengths)]))
    taken = [max(1, round(n * w)) for n, w in zip(lengths, weights, strict=False)]
    assert order.n_groups == sum(taken)
    counts: Counter[tuple[int, int]] = Counter()
    for epoch in range(epochs):
        places = list(order.epoch(epoch))
        assert len(places) == order.n_groups
        assert Counter(shard for shard, _ in places) == Counter(dict(enumerate(taken)))
        assert list(order.epoch(epoch, order.n_groups // 2)) == places[order.n_groups // 2 :]
        counts.update(places)
    for shard, length in enumerate(lengths):
        times = [counts[shard, row] for row in range(length)]
        assert max(times) - min(times) <= 1


def test_weights_of_one_change_nothing() -> None:
    plain = Order((5, 7), 1, 3, shuffle=True)
    weighted = Order((5, 7), 1, 3, shuffle=True, weights=(1.0, 1.0))
    assert list(plain.epoch(2)) == list(weighted.epoch(2))


def test_half_of_the_groups_an_epoch_are_all_of_them_in_two() -> None:
    order = Order((8,), 1, 0, shuffle=False, weights=(0.5,))
    first, second = ({row for _, row in order.epoch(epoch)} for epoch in range(2))
    assert first | second == set(range(8))
    assert len(first) == len(second) == 4
