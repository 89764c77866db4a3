"""Attention over a packed row, registered with transformers; runs in training workers."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

from orpo_ray.models.attention.flex import block_mask, flex
from orpo_ray.models.attention.kernels import Kernel
from orpo_ray.models.attention.layout import PackedLayout, Scores, Segment
from orpo_ray.models.attention.varlen import varlen

PACKED_ATTENTION = "orpo_ray_packed"
# Queries whose mask is made at once: the whole one of two answers of 16 k tokens would take 2.5 GB,
# and what lies behind a sliding window or after a query would be computed for nothing.
_QUERIES = 1_024
# Options that decoders pass through and that have no effect here.
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
    """The model's attention needs an option that packed rows do not support."""


def packed_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "1 heads tokens width"],
    key: Float[Tensor, "1 kv_heads tokens width"],
    value: Float[Tensor, "1 kv_heads tokens value_width"],
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Float[Tensor, "1 tokens heads value_width"], None]:
    """Attend with the mask of the row's layout; an attention function of `AttentionInterface`.

    Raises:
        PackingNotSupportedError: for a mask, dropout or option that is not supported, and when the
            model does not pass the layout through to its attention.
    """
    layout: PackedLayout | None = options.pop("packed_layout", None)
    kernel: Kernel = options.pop("packed_kernel", "sdpa")
    scaling = options.pop("scaling", None)
    window = options.pop("sliding_window", None)
    softcap = options.pop("softcap", None)
    sinks: Tensor | None = options.pop("s_aux", None)
    dropout = options.pop("dropout", 0.0)
    # A value may be a tensor: compare by identity.
    unknown = [
        k for k, v in options.items() if k not in _HARMLESS and v is not None and v is not False
    ]
    if softcap is not None and (kernel == "varlen" or sinks is not None):
        unknown.append("softcap")
    if layout is None or attention_mask is not None or dropout or unknown:
        raise PackingNotSupportedError(
            f"{type(module).__name__} cannot attend over a packed row: "
            f"layout handed through: {layout is not None}, own mask: {attention_mask is not None}, "
            f"dropout: {dropout}, options: {unknown}"
        )
    attend = by_segment if sinks is not None else _KERNELS[kernel]
    return attend(query, key, value, layout, Scores(scaling, window, softcap, sinks)), None


def prepare(layout: PackedLayout, kernel: Kernel, windows: Iterable[int | None]) -> None:
    """Build a kernel's indices or block masks before the first layer needs them.

    A compiled layer would trace that, and be compiled again for every number of segments.
    """
    if kernel == "varlen":
        _ = layout.gathered
    elif kernel == "flex":
        for window in windows:
            block_mask(layout, window)


def by_segment(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scores: Scores
) -> Tensor:
    """One SDPA call per segment."""
    lengths = [segment.length for segment in layout.segments]
    # `split` and not slices: the gradient of a slice is a whole row of zeros, for each segment.
    parts = zip(*(t.split(lengths, dim=2) for t in (query, key, value)), strict=True)
    outputs, prompt_key, prompt_value = [], key, value
    for segment, (own_query, own_key, own_value) in zip(layout.segments, parts, strict=True):
        n_prompt = segment.prompt_length
        if segment.start == segment.prompt_start:  # the first of its group: the prompt is inside
            prompt_key, prompt_value = own_key, own_value
        elif n_prompt:
            own_key = torch.cat([prompt_key[:, :, :n_prompt], own_key], dim=2)
            own_value = torch.cat([prompt_value[:, :, :n_prompt], own_value], dim=2)
        states = own_query, own_key, own_value
        if _is_slow(own_query):
            states = own_query.float(), own_key.float(), own_value.float()
        outputs.append(_attend(*states, layout, segment, scores).to(query.dtype))
    # Some models take a view of it.
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _is_slow(query: Tensor) -> bool:
    """Whether torch attends faster in fp32 to so few queries; on CPUs, backward up to 26 times.

    From a thousand queries on it does not (torch 2.13, benchmarks/RESULTS.md).
    """
    half = query.dtype in (torch.bfloat16, torch.float16)
    return half and query.device.type == "cpu" and query.shape[2] < _QUERIES


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    segment: Segment,
    scores: Scores,
) -> Tensor:
    """Attention of one segment over its own keys and values."""
    n_keys = key.shape[2]
    window = scores.window if scores.window is not None and scores.window < n_keys else None
    plain = window is None and segment.prompt_length == 0
    if plain and scores.softcap is None and scores.sinks is None:
        return functional.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            scale=scores.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    outputs, first = [], segment.prompt_length
    for part in query.split(_QUERIES, dim=2):
        queries = range(first, first + part.shape[2])
        keys = range(0 if window is None else max(0, first + 1 - window), queries.stop)
        seen_key, seen_value = (t[:, :, keys.start : keys.stop] for t in (key, value))
        mask = layout.mask(queries, keys, window)
        outputs.append(_attend_masked(part, seen_key, seen_value, mask, scores))
        first = queries.stop
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _attend_masked(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scores: Scores
) -> Tensor:
    """Attention of some queries over the keys that any of them sees."""
    if scores.softcap is not None:
        repeats = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
        scaling = query.shape[-1] ** -0.5 if scores.scaling is None else scores.scaling
        capped = scores.softcap * torch.tanh(query @ key.mT * scaling / scores.softcap)
        weights = capped.masked_fill(~mask, float("-inf")).softmax(dim=-1, dtype=torch.float32)
        return weights.to(query.dtype) @ value
    scaling = scores.scaling
    if scores.sinks is not None:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        query, key, value = _with_sink(query, key, value, scores.sinks / scaling)
        mask = functional.pad(mask, (1, 0), value=True)
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _with_sink(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Put a key before the others whose product with a query is the head's sink; its value is 0.

    Queries and keys get a component for it: the sink, and 1 for this key and 0 for others. With
    seven zeros, since kernels want widths that are multiples of 8.
    """
    batch, n_heads, n_queries, _ = query.shape
    own = sinks.to(query.dtype).view(1, n_heads, 1, 1).expand(batch, n_heads, n_queries, 1)
    query = torch.cat([query, functional.pad(own, (0, 7))], dim=-1)
    key = functional.pad(key, (0, 8, 1, 0))
    key[:, :, 0, -8] = 1
    return query, key, functional.pad(value, (0, 0, 1, 0))


_KERNELS = {"varlen": varlen, "flex": flex, "sdpa": by_segment}
AttentionInterface.register(PACKED_ATTENTION, packed_attention)
