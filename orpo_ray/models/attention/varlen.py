"""Variable-length flash attention over a packed row, on GPUs; in training workers.

One call for the whole row: every segment is a sequence of its own, whose keys are its prompt's and
its own, concatenated. Its causal mask is aligned to the bottom right.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from orpo_ray.models.attention.layout import GatheredKeys, PackedLayout, Scores

Heads = Float[Tensor, "1 heads tokens width"]
KeyHeads = Float[Tensor, "1 kv_heads tokens width"]
Attended = Float[Tensor, "1 tokens heads width"]


def varlen(
    query: Heads, key: KeyHeads, value: KeyHeads, layout: PackedLayout, scores: Scores
) -> Attended:
    """Attend with flash attention, which has no logit soft-capping.

    By the operator that `torch.nn.attention.varlen.varlen_attn` calls, with the same arguments, and
    not by that function: it goes through operators written in Python, forward and backward, which
    takes the host longer in every layer (benchmarks/RESULTS.md).
    """
    gathered = layout.gathered
    left, right = _window(scores)
    output: Tensor = torch.ops.aten._flash_attention_forward(
        *_gather(query, key, value, gathered),
        gathered.query_ends,
        gathered.key_ends,
        gathered.longest_query,
        gathered.longest_key,
        0.0,  # dropout
        left < 0,  # without a window; one of (left, 0) is causal as well
        False,  # the mask of the dropout, for debugging
        scale=scores.scaling,
        window_size_left=left,
        window_size_right=right,
    )[0]
    return output[None]


def _gather(
    query: Tensor, key: Tensor, value: Tensor, gathered: GatheredKeys
) -> tuple[Tensor, Tensor, Tensor]:
    """Transpose to (tokens, heads, width) and gather keys and values per segment.

    All get the dtype of the values: some models apply RoPE in fp32, which the kernel does not take.
    """
    keys, values = (t[0].transpose(0, 1).index_select(0, gathered.index) for t in (key, value))
    queries = query[0].transpose(0, 1).contiguous()
    return queries.to(value.dtype), keys.to(value.dtype), values


def _window(scores: Scores) -> tuple[int, int]:
    """Window sizes to the left and to the right of a query; -1 for unlimited."""
    return (-1 if scores.window is None else scores.window - 1, 0)
