"""Variable-length flash attention over a packed row, on GPUs; in training workers.

One call for the whole row: every segment is a sequence of its own, whose keys are its prompt's and
its own, concatenated. Its causal mask is aligned to the bottom right.
"""

from inspect import signature
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from orpo_ray.models.attention.layout import GatheredKeys, PackedLayout, Scores

Heads = Float[Tensor, "1 heads tokens width"]
KeyHeads = Float[Tensor, "1 kv_heads tokens width"]
Attended = Float[Tensor, "1 tokens heads width"]
# Torch 2.11 detects grouped-query attention by itself; later releases have an argument for it.
_HAS_ENABLE_GQA = "enable_gqa" in signature(varlen_attn).parameters


def varlen(
    query: Heads, key: KeyHeads, value: KeyHeads, layout: PackedLayout, scores: Scores
) -> Attended:
    """Attend with `torch.nn.attention.varlen`, which has no logit soft-capping."""
    gathered = layout.gathered
    is_grouped = query.shape[1] != key.shape[1]
    options: dict[str, Any] = {"enable_gqa": is_grouped} if _HAS_ENABLE_GQA else {}
    output: Tensor = varlen_attn(  # type: ignore[assignment]
        *_gather(query, key, value, gathered),
        gathered.query_ends,
        gathered.key_ends,
        gathered.longest_query,
        gathered.longest_key,
        scale=scores.scaling,
        window_size=_window(scores),
        **options,
    )
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
