"""Variable-length flash attention over a packed row, on GPUs; in training workers.

One call for the whole row: every segment is a sequence of its own, whose keys are its prompt's and
its own laid end to end, and which is causal from the bottom right.
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
# Torch 2.11 takes fewer heads of keys than of queries as they are; later ones want to be told.
_TOLD_OF_FEWER_HEADS = "enable_gqa" in signature(varlen_attn).parameters


def varlen(
    query: Heads, key: KeyHeads, value: KeyHeads, layout: PackedLayout, scores: Scores
) -> Attended:
    """Attend with the kernel that comes with torch, which knows no softcap."""
    gathered = layout.gathered
    fewer = query.shape[1] != key.shape[1]
    told: dict[str, Any] = {"enable_gqa": fewer} if _TOLD_OF_FEWER_HEADS else {}
    output: Tensor = varlen_attn(  # type: ignore[assignment]
        *_laid_out(query, key, value, gathered),
        gathered.query_ends,
        gathered.key_ends,
        gathered.longest_query,
        gathered.longest_key,
        scale=scores.scaling,
        window_size=_window(scores),
        **told,
    )
    return output[None]


def _laid_out(
    query: Tensor, key: Tensor, value: Tensor, gathered: GatheredKeys
) -> tuple[Tensor, Tensor, Tensor]:
    """Heads behind tokens, keys and values by segment, in the type of the values.

    Some models turn queries and keys in fp32, which these kernels do not take.
    """
    keys, values = (t[0].transpose(0, 1).index_select(0, gathered.index) for t in (key, value))
    queries = query[0].transpose(0, 1).contiguous()
    return queries.to(value.dtype), keys.to(value.dtype), values


def _window(scores: Scores) -> tuple[int, int]:
    """Keys seen to the left and to the right of a query's own; -1: all."""
    return (-1 if scores.window is None else scores.window - 1, 0)
