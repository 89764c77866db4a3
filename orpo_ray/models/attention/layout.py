"""Who sees whom in a packed row, as every attention kernel needs it; in training workers.

A prompt is causal over itself; a completion sees its prompt and itself, nothing else. A *segment*
is a stretch of queries with one set of keys: a prompt together with its first completion (plainly
causal), and every further completion, whose keys are its prompt's and its own.
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


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Move a tensor of the host to a device without waiting for it."""
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class Scores:
    """How attention scores are formed.

    Args:
        scaling: of the products; unset: one by the root of the heads' width.
        window: positions that a query sees, its own included; unset: all before it.
        softcap: scores are pressed into plus and minus this; unset: they are not.
    """

    scaling: float | None
    window: int | None
    softcap: float | None


@dataclass(frozen=True)
class Segment:
    """Queries and the prompt they see, as token ranges of a packed row.

    Args:
        start: first query token.
        length: query tokens; they see one another causally.
        prompt_start: first token of a prompt that is not part of the segment.
        prompt_length: tokens of that prompt, all seen by every query; 0 for a first segment.
    """

    start: int
    length: int
    prompt_start: int
    prompt_length: int


class PackedLayout:
    """Who sees whom in one packed row; masks and indices are made once and shared by layers.

    Not a dataclass on purpose: FSDP walks through those at every layer.

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
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}

    def mask(self, segment: Segment, window: int | None) -> Tensor:
        """Which of prompt and own keys each query of a segment sees; (queries, keys), bool."""
        key = (segment.length, segment.prompt_length, window)
        if key not in self._masks:
            n_keys = segment.prompt_length + segment.length
            query = torch.arange(segment.prompt_length, n_keys, device=self.device)[:, None]
            behind = query - torch.arange(n_keys, device=self.device)[None, :]
            seen = behind >= 0
            self._masks[key] = seen if window is None else seen & (behind < window)
        return self._masks[key]

    @cached_property
    def gathered(self) -> "GatheredKeys":
        """The same for variable-length kernels: every segment's keys laid end to end."""
        queries = np.array([segment.length for segment in self.segments])
        # The keys of a segment are two stretches of the row: its prompt, and its own.
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
    """Cumulative lengths from 0, as kernels want them."""
    return torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))


@dataclass(frozen=True)
class GatheredKeys:
    """Arguments of a variable-length kernel; `ends` are cumulative lengths from 0."""

    index: Tensor
    query_ends: Tensor
    key_ends: Tensor
    longest_query: int
    longest_key: int
