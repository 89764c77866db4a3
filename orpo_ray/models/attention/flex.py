"""FlexAttention over a packed row; in training workers.

Its block mask is built on the host from the row's segments, once per microbatch and window size,
whatever the number of layers, and without a device synchronization.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from orpo_ray.models.attention.layout import PackedLayout, Scores, Segment, to_device

_BLOCK = 128
_OPTIONS: Any = {"BACKEND": "TRITON"}  # never the decoding kernel, which short rows would get
Blocks = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]


def flex(
    query: Float[Tensor, "1 heads tokens width"],
    key: Float[Tensor, "1 kv_heads tokens width"],
    value: Float[Tensor, "1 kv_heads tokens value_width"],
    layout: PackedLayout,
    scores: Scores,
) -> Float[Tensor, "1 tokens heads value_width"]:
    """Attend with FlexAttention: compiled on GPUs, eager elsewhere."""
    attend = _compiled() if query.is_cuda else flex_attention
    output: Tensor = attend(
        query,
        key,
        value,
        score_mod=None if scores.softcap is None else _capped(scores.softcap),
        block_mask=block_mask(layout, scores.window),
        scale=scores.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=_OPTIONS,
    )
    return output.transpose(1, 2)


@cache
def _compiled() -> Any:
    """FlexAttention compiled for rows of any length, which are symbolic from the second one on.

    It is compiled again for rows of one block, of whole blocks, and without gradients, which for
    layers of two shapes exceeds torch's recompile limit. Beyond it, all scores of a row would be
    materialized.
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, fullgraph=True)


@cache
def _capped(softcap: float) -> Callable[..., Tensor]:
    """Logit soft-capping as a score modification: `softcap * tanh(score / softcap)`."""

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


def block_mask(layout: PackedLayout, window: int | None) -> BlockMask:
    """The row's block mask for one window size, built on first use."""
    if window not in layout.block_masks:
        layout.block_masks[window] = packed_block_mask(layout, window)
    return layout.block_masks[window]


def packed_block_mask(layout: PackedLayout, window: int | None) -> BlockMask:
    """Build the block mask: the mask by token, and its partial and full blocks."""
    columns = _seen_by_token(layout, window)
    own, prompt, prompt_stop = (to_device(torch.from_numpy(c), layout.device) for c in columns)

    # Windows are in the tensors: a window as a constant would be compiled for each size.
    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen_own = (key >= own[query]) & (key <= query)
        seen: Tensor = seen_own | ((key >= prompt[query]) & (key < prompt_stop[query]))
        return seen

    some, every = seen_blocks(layout, window)
    in_part, whole = (_in_order(blocks, layout.device) for blocks in (some & ~every, every))
    return BlockMask.from_kv_blocks(
        *in_part,
        *whole,
        BLOCK_SIZE=_BLOCK,
        mask_mod=sees,
        seq_lengths=(layout.n_tokens, layout.n_tokens),
    )


def _seen_by_token(layout: PackedLayout, window: int | None) -> npt.NDArray[np.int32]:
    """(3, tokens): each query's first own key, and its prompt keys from first to last + 1."""
    columns = np.empty((3, layout.n_tokens), dtype=np.int32)
    for segment in layout.segments:
        queries = np.arange(segment.start, segment.start + segment.length)
        columns[0, queries], columns[1, queries] = _reach(segment, queries, window)
        columns[2, queries] = segment.prompt_start + segment.prompt_length
    return columns


def seen_blocks(layout: PackedLayout, window: int | None) -> tuple[Blocks, Blocks]:
    """(query blocks, key blocks): which are not empty, and which are full."""
    n_blocks = -(-layout.n_tokens // _BLOCK)
    some = np.zeros((n_blocks, n_blocks), dtype=np.bool_)
    every = np.zeros_like(some)
    for segment in layout.segments:
        _mark(some, every, segment, window)
    return some, every


def _mark(some: Blocks, every: Blocks, segment: Segment, window: int | None) -> None:
    """Mark the blocks that the queries of one segment attend to."""
    stop = segment.start + segment.length
    prompt_stop = segment.prompt_start + segment.prompt_length
    for row in range(segment.start // _BLOCK, -(-stop // _BLOCK)):
        first, last = max(row * _BLOCK, segment.start), min((row + 1) * _BLOCK, stop) - 1
        (own, own_of_all), (prompt, prompt_of_all) = _reach(
            segment, np.array([first, last]), window
        )
        some[row, own // _BLOCK : last // _BLOCK + 1] = True
        if prompt < prompt_stop:
            some[row, prompt // _BLOCK : -(-prompt_stop // _BLOCK)] = True
        if last - first + 1 == _BLOCK:  # else queries of other segments are in the block
            every[row, -(-own_of_all // _BLOCK) : row] = True
            every[row, -(-prompt_of_all // _BLOCK) : prompt_stop // _BLOCK] = True


def _reach(segment: Segment, queries: Indices, window: int | None) -> tuple[Indices, Indices]:
    """The first own key and the first prompt key in each query's window."""
    own = queries - (segment.length + segment.prompt_length if window is None else window - 1)
    # The prompt ends where the segment begins, as positions go.
    prompt = own - segment.start + segment.prompt_start + segment.prompt_length
    return np.maximum(segment.start, own), np.maximum(segment.prompt_start, prompt)


def _in_order(blocks: Blocks, device: torch.device) -> tuple[Tensor, Tensor]:
    """Number of key blocks per query block, and their indices first, in ascending order."""
    order = np.argsort(~blocks, axis=-1, kind="stable").astype(np.int32)
    counts = blocks.sum(axis=-1, dtype=np.int32)
    return (
        to_device(torch.from_numpy(counts)[None, None], device),
        to_device(torch.from_numpy(order)[None, None], device),
    )
