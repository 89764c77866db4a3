"""The prompt group: one prompt, its distinct completions and the pairs among them, as token ids."""

from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int32]


@dataclass(frozen=True)
class RowId:
    """Identifies a source row: index of the file and row number in it, both from 0."""

    source: int
    row: int


@dataclass(frozen=True)
class PromptGroup:
    """One prompt, its distinct completions and the pairs among them; the unit of training data.

    A plain pair is a group of two completions. An answer without a rejected one, which only
    supervised fine-tuning takes, is a pair of a completion and itself.

    Args:
        prompt: token ids of the prompt, possibly empty.
        completions: token ids of every distinct completion, none of them empty.
        pairs: (chosen, rejected) of each pair, as indices into `completions`.
        row_ids: the source row of every pair, in the order of `pairs`.
    """

    prompt: TokenIds
    completions: tuple[TokenIds, ...]
    pairs: tuple[tuple[int, int], ...]
    row_ids: tuple[RowId, ...]

    @property
    def n_tokens(self) -> int:
        """Number of tokens in a packed row: the prompt once and every completion once."""
        return len(self.prompt) + sum(len(completion) for completion in self.completions)


def chosen_alone(group: PromptGroup) -> PromptGroup:
    """The group without its rejected completions."""
    used = sorted({chosen for chosen, _ in group.pairs})
    indices = {index: new for new, index in enumerate(used)}
    return PromptGroup(
        prompt=group.prompt,
        completions=tuple(group.completions[index] for index in used),
        pairs=tuple((indices[chosen], indices[chosen]) for chosen, _ in group.pairs),
        row_ids=group.row_ids,
    )


def without_rows(group: PromptGroup, rows: Set[RowId]) -> PromptGroup | None:
    """Remove the pairs of the given source rows, and completions that no other pair uses.

    Returns:
        None when no pair is left.
    """
    kept = [i for i, row_id in enumerate(group.row_ids) if row_id not in rows]
    if len(kept) == len(group.pairs):
        return group
    if not kept:
        return None
    used = sorted({index for i in kept for index in group.pairs[i]})
    indices = {index: new for new, index in enumerate(used)}
    return PromptGroup(
        prompt=group.prompt,
        completions=tuple(group.completions[index] for index in used),
        pairs=tuple((indices[group.pairs[i][0]], indices[group.pairs[i][1]]) for i in kept),
        row_ids=tuple(group.row_ids[i] for i in kept),
    )


def merge_groups(groups: Sequence[PromptGroup]) -> PromptGroup:
    """Merge groups of the same prompt into one, storing equal completions once.

    Pairs keep their order, and a pair that occurs twice still counts twice.

    Args:
        groups: at least one.

    Raises:
        AssertionError: if the prompts differ.
    """
    if len({group.prompt.tobytes() for group in groups}) > 1:
        raise AssertionError(f"{groups[0].row_ids} and {groups[1].row_ids} share no prompt")
    completions: dict[bytes, int] = {}
    distinct: list[TokenIds] = []
    pairs: list[tuple[int, int]] = []
    for group in groups:
        indices = []
        for completion in group.completions:
            index = completions.setdefault(completion.tobytes(), len(distinct))
            if index == len(distinct):
                distinct.append(completion)
            indices.append(index)
        pairs += [(indices[chosen], indices[rejected]) for chosen, rejected in group.pairs]
    row_ids = tuple(row_id for group in groups for row_id in group.row_ids)
    return PromptGroup(groups[0].prompt, tuple(distinct), tuple(pairs), row_ids)
