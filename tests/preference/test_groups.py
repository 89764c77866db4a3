"""Groups that lose some of their pairs."""

import numpy as np

from orpo_ray.preference.groups import PromptGroup, RowId, without_rows


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


RANKING = PromptGroup(
    prompt=ids(1, 2),
    completions=(ids(3), ids(4, 5), ids(6)),
    pairs=((0, 1), (0, 2), (1, 2)),
    row_ids=(RowId(0, 10), RowId(0, 11), RowId(0, 12)),
)


def test_a_completion_that_no_pair_needs_goes_as_well():
    """Without rows 10 and 12 only the pair (3 over 6) is left; 4 5 is in no pair of it."""
    left = without_rows(RANKING, {RowId(0, 10), RowId(0, 12)})
    assert [completion.tolist() for completion in left.completions] == [[3], [6]]
    assert left.pairs == ((0, 1),)
    assert left.row_ids == (RowId(0, 11),)
    assert left.prompt is RANKING.prompt


def test_nothing_to_leave_out_is_the_same_group_and_everything_is_none():
    assert without_rows(RANKING, {RowId(1, 10)}) is RANKING
    assert without_rows(RANKING, set(RANKING.row_ids)) is None
