"""Load-balancing loss of mixture-of-experts models over packed tokens."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def router_loss(
    router_logits: Sequence[Float[Tensor, "tokens experts"]],
    multiplicity: Float[Tensor, " tokens"],
    experts_per_token: int,
) -> Float[Tensor, ""]:
    """Load-balancing loss: n_experts * sum over experts of token share * mean router probability.

    Every packed token is weighted by its multiplicity, so the loss equals that of padded rows.

    Args:
        router_logits: router logits of every layer.
        multiplicity: number of padded (prompt + answer) rows that would hold the token.
        experts_per_token: number of experts that each token is routed to (top-k).

    Returns:
        The unweighted loss; `experts_per_token` when the load is even.

    Source:
        Switch Transformers, arXiv:2101.03961, equations 4 to 6, over all layers at once as
        transformers' `load_balancing_loss_func` has it.
    """
    n_experts = router_logits[0].shape[-1]
    sent = multiplicity.new_zeros(n_experts)
    probability = multiplicity.new_zeros(n_experts)
    for logits in router_logits:
        routing = torch.softmax(logits, dim=-1)
        chosen = routing.topk(experts_per_token, dim=-1).indices
        weights = multiplicity[:, None].expand_as(chosen)
        sent = sent.index_add(0, chosen.reshape(-1), weights.reshape(-1))
        probability = probability + (routing.to(multiplicity.dtype) * multiplicity[:, None]).sum(0)
    tokens = multiplicity.sum() * len(router_logits)
    return n_experts * torch.sum((sent / tokens) * (probability / tokens))
