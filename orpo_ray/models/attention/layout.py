"""The attention mask of a packed row: block-diagonal and causal; in training workers.

A prompt attends to itself; a completion attends to its prompt and to itself, nothing else. A
*segment* is a range of queries with the same keys: a prompt together with its first completion
(plainly causal), or a further completion, whose keys are its prompt's and its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from orpo_ray.dataset.packing import GroupSpan

_KEPT_MASK = 2**20  # entries


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to a device asynchronously, from pinned memory."""
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class Scores:
    """How attention scores are computed.

    Args:
        scaling: factor of the dot products; None: 1 / sqrt(head width).
        window: size of the sliding window, the query's own position included; None: unlimited.
        softcap: cap of logit soft-capping, `softcap * tanh(score / softcap)`; None: no capping.
        sinks: of each head, the score of a key without value that every query attends to, too;
            None: there is none.
    """

    scaling: float | None
    window: int | None
    softcap: float | None
    sinks: Tensor | None = None


@dataclass(frozen=True)
class Segment:
    """Queries and the prompt they attend to, as token ranges of a packed row.

    Args:
        start: first query token.
        length: number of query tokens, causal among themselves.
        prompt_start: first token of a prompt that is not part of the segment.
        prompt_length: number of its tokens, which every query attends to; 0 for the first segment
            of a group.
    """

    start: int
    length: int
    prompt_start: int
    prompt_length: int


class PackedLayout:
    """The segments of a packed row; masks and indices are built once and shared by all layers.

    Not a dataclass on purpose: FSDP traverses dataclass arguments at every layer.

    Args:
        spans: the groups of the row, in order.
        device: of the row.
    """

    def __init__(self, spans: Sequence[GroupSpan], device: torch.device) -> None:
        segments, start = [], 0
        for span in spans:
            first = span.prompt + (span.completions[0] if span.completions else 0)
            segments.append(Segment(start, first, start, 0))
            token = start + first
            for length in span.completions[1:]:
                segments.append(Segment(token, length, start, span.prompt))
                token += length
            start = token
        self.segments = tuple(segments)
        self.device = device
        self.n_tokens = start
        self.block_masks: dict[int | None, BlockMask] = {}  # FlexAttention's, by window
        self._masks: dict[tuple[int, int, int, int | None], Tensor] = {}

    def mask(self, queries: range, keys: range, window: int | None) -> Tensor:
        """Boolean mask (queries, keys), both ranges of positions: a query sees what is not later.

        Small ones are kept, for the next layers.
        """
        key = (queries.start - keys.start, len(queries), len(keys), window)
        mask = self._masks.get(key)
        if mask is None:
            position = torch.arange(queries.start, queries.stop, device=self.device)[:, None]
            behind = position - torch.arange(keys.start, keys.stop, device=self.device)[None, :]
            seen = behind >= 0
            mask = seen if window is None else seen & (behind < window)
            if mask.numel() <= _KEPT_MASK:
                self._masks[key] = mask
        return mask

    @cached_property
    def gathered(self) -> "GatheredKeys":
        """Arguments of variable-length kernels: the keys of all segments, concatenated."""
        queries = np.array([segment.length for segment in self.segments])
        # The keys of a segment are two ranges of the row: its prompt's, and its own.
        stretches = [(s.prompt_start, s.prompt_length, s.start, s.length) for s in self.segments]
        starts, lengths = np.array(stretches).reshape(-1, 2).T
        ends = lengths.cumsum()
        index = np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)
        keys = lengths.reshape(-1, 2).sum(axis=1)
        return GatheredKeys(
            index=to_device(torch.from_numpy(index), self.device),
            query_ends=to_device(_ends(queries), self.device),
            key_ends=to_device(_ends(keys), self.device),
            longest_query=int(queries.max()),
            longest_key=int(keys.max()),
        )


def _ends(lengths: npt.NDArray[np.int64]) -> Tensor:
    """Cumulative lengths, beginning with 0 (`cu_seqlens`)."""
    return torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))


@dataclass(frozen=True)
class GatheredKeys:
    """Arguments of a variable-length kernel; `*_ends` are its `cu_seqlens`."""

    index: Tensor
    query_ends: Tensor
    key_ends: Tensor
    longest_query: int
    longest_key: int
