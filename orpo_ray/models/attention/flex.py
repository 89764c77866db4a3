"""FlexAttention over a packed row; in training workers.

It is given a mask in blocks, made on the host from the row's segments: once a microbatch and
window, whatever the number of layers, and without a word from the device.
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
_OPTIONS: Any = {"BACKEND": "TRITON"}  # also for short rows: never the kernel of decoding
Blocks = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]


def flex(
    query: Float[Tensor, "1 heads tokens width"],
    key: Float[Tensor, "1 kv_heads tokens width"],
    value: Float[Tensor, "1 kv_heads tokens value_width"],
    layout: PackedLayout,
    scores: Scores,
) -> Float[Tensor, "1 tokens heads value_width"]:
    """Attend with FlexAttention: compiled on GPUs, step by step elsewhere."""
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
    """Compiled for rows of any length: from the second one on, lengths are symbols.

    It is compiled anew for rows of one block, of whole blocks, and without gradients, which with
    layers of two shapes is above torch's limit; after it, all scores of a row would be held.
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, fullgraph=True)


@cache
def _capped(softcap: float) -> Callable[..., Tensor]:
    """Scores pressed into plus and minus `softcap`."""

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


def block_mask(layout: PackedLayout, window: int | None) -> BlockMask:
    """The row's mask for one window; made when it is first asked for."""
    if window not in layout.block_masks:
        layout.block_masks[window] = packed_block_mask(layout, window)
    return layout.block_masks[window]


def packed_block_mask(layout: PackedLayout, window: int | None) -> BlockMask:
    """Who sees whom, token by token, and which blocks of it are seen in part or as a whole."""
    columns = _seen_by_token(layout, window)
    own, prompt, prompt_stop = (to_device(torch.from_numpy(c), layout.device) for c in columns)

    # The same for every window, which would be compiled for each by itself.
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
    """(3, tokens): the first own key that a token sees, the first and last + 1 of the prompt's."""
    columns = np.empty((3, layout.n_tokens), dtype=np.int32)
    for segment in layout.segments:
        queries = np.arange(segment.start, segment.start + segment.length)
        columns[0, queries], columns[1, queries] = _reach(segment, queries, window)
        columns[2, queries] = segment.prompt_start + segment.prompt_length
    return columns


def seen_blocks(layout: PackedLayout, window: int | None) -> tuple[Blocks, Blocks]:
    """(query blocks, key blocks): where some query sees some key, and where each sees all."""
    n_blocks = -(-layout.n_tokens // _BLOCK)
    some = np.zeros((n_blocks, n_blocks), dtype=np.bool_)
    every = np.zeros_like(some)
    for segment in layout.segments:
        _mark(some, every, segment, window)
    return some, every


def _mark(some: Blocks, every: Blocks, segment: Segment, window: int | None) -> None:
    """Add what the queries of one segment see."""
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
        if last - first + 1 == _BLOCK:  # else other queries of the block see other keys
            every[row, -(-own_of_all // _BLOCK) : row] = True
            every[row, -(-prompt_of_all // _BLOCK) : prompt_stop // _BLOCK] = True


def _reach(segment: Segment, queries: Indices, window: int | None) -> tuple[Indices, Indices]:
    """The first keys of a segment's own part and of its prompt that each query's window reaches."""
    own = queries - (segment.length + segment.prompt_length if window is None else window - 1)
    # The prompt ends where the segment begins, as positions go.
    prompt = own - segment.start + segment.prompt_start + segment.prompt_length
    return np.maximum(segment.start, own), np.maximum(segment.prompt_start, prompt)


def _in_order(blocks: Blocks, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and which: those first, in order."""
    order = np.argsort(~blocks, axis=-1, kind="stable").astype(np.int32)
    counts = blocks.sum(axis=-1, dtype=np.int32)
    return (
        to_device(torch.from_numpy(counts)[None, None], device),
        to_device(torch.from_numpy(order)[None, None], device),
    )
