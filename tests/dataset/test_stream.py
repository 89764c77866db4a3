"""The feed: the same rows in global batch k at every world size, entered anywhere."""

from collections import Counter

import pytest

from tests.reference.small_run import BATCH, N_SHARDS, SHARD_ROWS, make_inputs, token_stream

N_PAIRS = N_SHARDS * SHARD_ROWS  # 85 = 10 batches of 8, and one of 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("stream")
    make_inputs(path)
    return path


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_row_exactly_once_an_epoch(folder, world_size):
    streams = [token_stream(folder, rank, world_size) for rank in range(world_size)]
    n_steps = streams[0].steps_per_epoch
    assert n_steps == 11
    for epoch in range(2):
        met = Counter(
            row_id
            for stream in streams
            for batch in stream.batches(epoch * n_steps, (epoch + 1) * n_steps)
            for row in batch.rows
            for row_id in row.row_ids
        )
        assert len(met) == N_PAIRS
        assert set(met.values()) == {1}


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_global_batches_do_not_depend_on_the_world_size(folder, world_size):
    alone = list(token_stream(folder, 0, 1).batches(0, 22))
    ranks = [list(token_stream(folder, r, world_size).batches(0, 22)) for r in range(world_size)]
    for step, whole in enumerate(alone):
        shares = [rank[step] for rank in ranks]
        assert sorted(map(repr, whole.row_ids)) == sorted(
            repr(row_id) for share in shares for row in share.rows for row_id in row.row_ids
        )
        for share in shares:
            assert share.row_ids == whole.row_ids
            assert (share.n_pairs, share.n_tokens) == (whole.n_pairs, whole.n_tokens)
            assert share.n_nll_tokens == whole.n_nll_tokens
            assert len(share.rows) == len(shares[0].rows)
        assert whole.n_nll_tokens == sum(row.n_nll_tokens for s in shares for row in s.rows)
    assert {batch.n_pairs for batch in alone[:10]} == {BATCH}
    assert alone[10].n_pairs == N_PAIRS - 10 * BATCH


def test_a_batch_without_some_rows_has_all_others(folder):
    stream = token_stream(folder, 0, 1)
    whole = list(stream.batches(0, 15))[13]
    out = set(whole.row_ids[2:4])
    left = stream.batch_without(13, out)
    assert left.row_ids == whole.row_ids[:2] + whole.row_ids[4:]
    assert (left.step, left.epoch, left.n_pairs) == (13, 1, BATCH - 2)
    nothing = stream.batch_without(13, set(whole.row_ids))
    assert (nothing.n_pairs, nothing.row_ids) == (0, ())


@pytest.mark.parametrize("first", [1, 9, 11, 17])
def test_entering_at_a_step_gives_the_same_batches(folder, first):
    whole = list(token_stream(folder, 0, 2).batches(0, 20))
    late = list(token_stream(folder, 0, 2).batches(first, 20))
    assert [batch.row_ids for batch in late] == [batch.row_ids for batch in whole[first:]]
    assert [batch.step for batch in late] == list(range(first, 20))


def test_the_position_of_a_step_is_its_epoch_and_batch(folder):
    """85 pairs by 8 are 11 batches an epoch: step 24 is the third batch of the third epoch."""
    assert token_stream(folder, 0, 2).position(24) == {
        "epoch": 2,
        "batch_of_epoch": 2,
        "global_batch_pairs": 8,
    }


def test_an_error_while_reading_ahead_is_raised_where_it_is_read(folder, tmp_path):
    make_inputs(tmp_path)
    (tmp_path / "tokens" / "3.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"3\.parquet"):
        list(token_stream(tmp_path, 0, 1).batches(0, 11))


def test_a_feed_left_early_stops_its_thread(folder):
    import threading

    batches = token_stream(folder, 0, 1).batches(0, 1000)
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "orpo-feed"]
