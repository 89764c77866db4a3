"""The prompt group: one prompt, its distinct completions and the pairs among them, as token ids."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int32]


@dataclass(frozen=True)
class RowId:
    """Where a pair comes from: the index of its source file and its row there, both from 0."""

    source: int
    row: int


@dataclass(frozen=True)
class PromptGroup:
    """One prompt with its distinct completions; a plain pair is a group with two completions.

    Args:
        prompt: token ids of the prompt, possibly empty.
        completions: token ids of every distinct completion, none of them empty.
        pairs: one (chosen, rejected) entry a pair, each an index into `completions`.
        row_ids: the source row of every pair, in the order of `pairs`.
    """

    prompt: TokenIds
    completions: tuple[TokenIds, ...]
    pairs: tuple[tuple[int, int], ...]
    row_ids: tuple[RowId, ...]

    @property
    def n_tokens(self) -> int:
        """Tokens this group takes in a packed row: the prompt once, every completion once."""
        return len(self.prompt) + sum(len(completion) for completion in self.completions)
