"""Attention over a packed row, registered with transformers; runs in training workers.

A prompt is causal over itself; a completion sees its prompt and itself, nothing else. A *segment*
is a stretch of queries with one set of keys: a prompt together with its first completion (plainly
causal), and every further completion, whose keys are its prompt's and its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

from orpo_ray.preference.packing import GroupSpan

PACKED_ATTENTION = "orpo_ray_packed"
# What decoders pass along that changes nothing here.
_HARMLESS = {
    "position_ids",
    "cache_position",
    "use_cache",
    "is_causal",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
}


class PackingNotSupportedError(RuntimeError):
    """The model's attention needs something that the packed row cannot give it."""


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
        index, q_ends, k_ends = [], [0], [0]
        for segment in self.segments:
            prompt = range(segment.prompt_start, segment.prompt_start + segment.prompt_length)
            index += [*prompt, *range(segment.start, segment.start + segment.length)]
            q_ends.append(q_ends[-1] + segment.length)
            k_ends.append(len(index))
        pinned = self.device.type == "cuda"

        def move(values: list[int], dtype: torch.dtype) -> Tensor:
            host = torch.tensor(values, dtype=dtype, pin_memory=pinned)
            return host.to(self.device, non_blocking=True)

        return GatheredKeys(
            index=move(index, torch.int64),
            query_ends=move(q_ends, torch.int32),
            key_ends=move(k_ends, torch.int32),
            longest_query=max(segment.length for segment in self.segments),
            longest_key=max(s.prompt_length + s.length for s in self.segments),
        )


@dataclass(frozen=True)
class GatheredKeys:
    """Arguments of a variable-length kernel; `ends` are cumulative lengths from 0."""

    index: Tensor
    query_ends: Tensor
    key_ends: Tensor
    longest_query: int
    longest_key: int


def packed_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "1 heads tokens width"],
    key: Float[Tensor, "1 kv_heads tokens width"],
    value: Float[Tensor, "1 kv_heads tokens value_width"],
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Float[Tensor, "1 tokens heads value_width"], None]:
    """Attend as the row's layout says; the signature is transformers' AttentionInterface's.

    Raises:
        PackingNotSupportedError: when the model asks for a mask, dropout or an option that this
            cannot honour, or does not hand the layout through.
    """
    layout = options.pop("packed_layout", None)
    scaling = options.pop("scaling", None)
    window = options.pop("sliding_window", None)
    softcap = options.pop("softcap", None)
    dropout = options.pop("dropout", 0.0)
    # A value may be a tensor, as attention sinks are: it is not to be compared.
    unknown = [
        k for k, v in options.items() if k not in _HARMLESS and v is not None and v is not False
    ]
    if layout is None or attention_mask is not None or dropout or unknown:
        raise PackingNotSupportedError(
            f"{type(module).__name__} cannot attend over a packed row: "
            f"layout handed through: {layout is not None}, own mask: {attention_mask is not None}, "
            f"dropout: {dropout}, options: {unknown}"
        )
    if query.is_cuda and softcap is None and query.dtype in (torch.bfloat16, torch.float16):
        return _variable_length(query, key, value, layout, scaling, window), None
    return _by_segment(query, key, value, layout, _Scores(scaling, window, softcap)), None


@dataclass(frozen=True)
class _Scores:
    """How attention scores are formed."""

    scaling: float | None
    window: int | None
    softcap: float | None


def _variable_length(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """One flash-attention call for the whole row, causal from the bottom right."""
    from torch.nn.attention.varlen import varlen_attn

    gathered = layout.gathered
    output: Tensor = varlen_attn(  # type: ignore[assignment]
        query[0].transpose(0, 1).contiguous(),
        key[0].transpose(0, 1).index_select(0, gathered.index),
        value[0].transpose(0, 1).index_select(0, gathered.index),
        gathered.query_ends,
        gathered.key_ends,
        gathered.longest_query,
        gathered.longest_key,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[None]


def _by_segment(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scores: _Scores
) -> Tensor:
    """One SDPA call a segment."""
    lengths = [segment.length for segment in layout.segments]
    # `split` and not slices: the gradient of a slice is a whole row of zeros, one a segment.
    parts = zip(*(t.split(lengths, dim=2) for t in (query, key, value)), strict=True)
    outputs, prompt_key, prompt_value = [], key, value
    for segment, (own_query, own_key, own_value) in zip(layout.segments, parts, strict=True):
        n_prompt = segment.prompt_length
        if segment.start == segment.prompt_start:  # the first of its group: the prompt is inside
            prompt_key, prompt_value = own_key, own_value
        elif n_prompt:
            own_key = torch.cat([prompt_key[:, :, :n_prompt], own_key], dim=2)
            own_value = torch.cat([prompt_value[:, :, :n_prompt], own_value], dim=2)
        outputs.append(_attend(own_query, own_key, own_value, layout, segment, scores))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    segment: Segment,
    scores: _Scores,
) -> Tensor:
    """Attention of one segment over its own keys and values."""
    window = scores.window if scores.window is not None and scores.window < key.shape[2] else None
    plain = window is None and segment.prompt_length == 0
    if scores.softcap is not None:
        mask = layout.mask(segment, window)
        repeats = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
        scaling = query.shape[-1] ** -0.5 if scores.scaling is None else scores.scaling
        capped = scores.softcap * torch.tanh(query @ key.mT * scaling / scores.softcap)
        weights = capped.masked_fill(~mask, float("-inf")).softmax(dim=-1, dtype=torch.float32)
        return weights.to(query.dtype) @ value
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if plain else layout.mask(segment, window),
        is_causal=plain,
        scale=scores.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
