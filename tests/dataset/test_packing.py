"""Packed rows and the sharing out of a global batch."""

import numpy as np
import pytest

from orpo_ray.dataset.packing import balanced_bins, nll_tokens, pack
from orpo_ray.preference.groups import PromptGroup, RowId


def group(prompt, completions, pairs, row=0) -> PromptGroup:
    return PromptGroup(
        prompt=np.asarray(prompt, dtype=np.int32),
        completions=tuple(np.asarray(c, dtype=np.int32) for c in completions),
        pairs=tuple(pairs),
        row_ids=tuple(RowId(0, row + i) for i in range(len(pairs))),
    )


def test_a_plain_pair_is_laid_out_as_written():
    """Prompt [1 2 3], chosen [4 5], rejected [6].

    Positions: both answers continue at 3. Predictions: 1->2, 2->3, and from the prompt's last
    token both first answer tokens (4 and 6); 4->5. 6 predicts nothing, so it is not projected.
    NLL counts 2, 3, 4, 5 and not the rejected 6. In padded rows the prompt stands twice.
    """
    row = pack([group([1, 2, 3], [[4, 5], [6]], [(0, 1)])], chunk_tokens=99, prompt_counts=True)
    assert row.token_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 3]
    assert row.multiplicity.tolist() == [2, 2, 2, 1, 1, 1]
    assert row.positions.tolist() == [0, 1, 2, 3]
    predictions = zip(row.positions[row.predicted_at], row.target_ids, strict=True)
    assert [tuple(map(int, p)) for p in predictions] == [(0, 2), (1, 3), (2, 4), (3, 5), (2, 6)]
    assert row.nll_weights.tolist() == [1, 1, 1, 1, 0]
    assert row.completion.tolist() == [2, 2, 0, 0, 1]  # 2: of no completion
    assert row.completion_lengths.tolist() == [2, 1]
    assert (row.chosen.tolist(), row.rejected.tolist()) == ([0], [1])
    assert row.n_nll_tokens == 4


def test_only_the_answers_are_projected_when_only_they_count():
    row = pack([group([1, 2, 3], [[4, 5], [6]], [(0, 1)])], chunk_tokens=99, prompt_counts=False)
    assert row.positions.tolist() == [2, 3]
    assert row.target_ids.tolist() == [4, 5, 6]
    assert row.n_nll_tokens == 2


def test_without_a_prompt_the_first_token_of_an_answer_is_no_target():
    row = pack([group([], [[4, 5, 6], [7, 8]], [(0, 1)])], chunk_tokens=99, prompt_counts=True)
    assert row.target_ids.tolist() == [5, 6, 8]
    assert row.positions.tolist() == [0, 1, 3]
    assert row.completion_lengths.tolist() == [2, 1]
    assert row.n_nll_tokens == 2


def test_a_ranking_shares_its_prompt_and_its_completions():
    """Three answers a > b > c as pairs (a, b), (a, c), (b, c).

    NLL: the prompt's one target counts 3 times (once a pair), a twice, b once, c never.
    """
    row = pack(
        [group([1, 2], [[3], [4], [5]], [(0, 1), (0, 2), (1, 2)])],
        chunk_tokens=99,
        prompt_counts=True,
    )
    assert row.token_ids.tolist() == [1, 2, 3, 4, 5]
    assert row.nll_weights.tolist() == [3, 2, 1, 0]
    assert row.multiplicity.tolist() == [6, 6, 2, 2, 2]
    assert row.n_nll_tokens == 6
    assert row.n_pairs == 3


@pytest.mark.parametrize("prompt_counts", [True, False])
def test_nll_tokens_are_counted_without_packing(prompt_counts):
    for example in (
        group([1, 2, 3], [[4, 5], [6]], [(0, 1)]),
        group([], [[4, 5], [6, 7, 8], [9, 1]], [(0, 1), (2, 1)]),
        group([1], [[4], [6]], [(1, 0), (0, 1)]),
    ):
        row = pack([example], chunk_tokens=2, prompt_counts=prompt_counts)
        assert nll_tokens(example, prompt_counts) == row.n_nll_tokens


@pytest.mark.parametrize("chunk_tokens", [1, 3, 4, 7, 1000])
def test_chunks_cover_everything_once_and_hold_whole_pairs(chunk_tokens):
    rng = np.random.default_rng(0)

    def ids(low, high):
        return rng.integers(1, 50, rng.integers(low, high))

    groups = [
        group(ids(0, 12), [ids(2, 6), ids(2, 6), ids(2, 6)], [(0, 1), (2, 1)]) for _ in range(6)
    ]
    row = pack(groups, chunk_tokens, prompt_counts=True)
    for name, size in (
        ("positions", len(row.positions)),
        ("targets", len(row.target_ids)),
        ("completions", len(row.completion_lengths)),
        ("pairs", len(row.chosen)),
    ):
        edges = [getattr(chunk, name) for chunk in row.chunks]
        assert [edges[0][0], *[stop for _, stop in edges]] == [
            *[start for start, _ in edges],
            size,
        ]
    for chunk in row.chunks:
        inside = range(*chunk.completions)
        pairs = slice(*chunk.pairs)
        assert all(c in inside for c in [*row.chosen[pairs], *row.rejected[pairs]])
        at = row.predicted_at[slice(*chunk.targets)]
        assert all(p in range(*chunk.positions) for p in at)
        n_positions = chunk.positions[1] - chunk.positions[0]
        assert n_positions <= chunk_tokens or len(inside) == 3


def test_no_group_is_one_token_that_predicts_nothing():
    row = pack([], chunk_tokens=8, prompt_counts=True)
    assert len(row.token_ids) == 1
    assert len(row.target_ids) == row.n_pairs == row.n_nll_tokens == 0
    assert row.chunks == ()


@pytest.mark.parametrize("n_workers", [1, 2, 3, 8])
@pytest.mark.parametrize("budget", [1, 40, 200, 10_000])
def test_a_batch_is_shared_out_once_in_equal_numbers(n_workers, budget):
    rng = np.random.default_rng(3)
    sizes = rng.integers(5, 60, 33).tolist()
    bins = balanced_bins(sizes, n_workers, budget)
    assert len(bins) == n_workers
    assert len({len(worker) for worker in bins}) == 1
    flat = [i for worker in bins for microbatch in worker for i in microbatch]
    assert sorted(flat) == list(range(33))
    loads = [sum(sizes[i] for i in m) for worker in bins for m in worker if len(m) > 1]
    assert all(load <= budget for load in loads)


def test_workers_carry_about_the_same():
    """Longest-first leaves no worker more than one group's length above another."""
    rng = np.random.default_rng(4)
    sizes = rng.integers(5, 500, 64).tolist()
    loads = [
        sum(sizes[i] for microbatch in worker for i in microbatch)
        for worker in balanced_bins(sizes, 4, 10**9)
    ]
    assert max(loads) - min(loads) <= max(sizes)


def test_more_workers_than_groups_leaves_empty_bins():
    assert balanced_bins([5, 3], 4, 100) == [[[0]], [[1]], [[]], [[]]]


def test_a_batch_with_nothing_left_is_an_empty_bin_for_everyone():
    assert balanced_bins([], 3, 100) == [[[]], [[]], [[]]]
