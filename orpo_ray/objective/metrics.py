"""ORPO's metrics, computed from sums that add up over microbatches, steps and workers."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum

import torch
from jaxtyping import Float
from torch import Tensor

from orpo_ray.objective.odds_ratio import N_PAIR_SUMS, pair_sums

N_SUMS = N_PAIR_SUMS + 4


def batch_sums(
    nll_sum: Float[Tensor, ""],
    nll_tokens: int,
    chosen_log_probs: Float[Tensor, " pairs"],
    rejected_log_probs: Float[Tensor, " pairs"],
    aux_loss: Float[Tensor, ""] | None,
) -> Float[Tensor, "10"]:
    """Compute the sums of one packed row, a float64 vector on its device without a sync.

    Args:
        nll_sum: summed NLL, in nats.
        nll_tokens: number of tokens that it sums over.
        chosen_log_probs: mean log-probability per token of the chosen answers, in nats.
        rejected_log_probs: the same for the rejected answers.
        aux_loss: router loss of the row, weighted by its number of pairs; None without experts.
    """
    pairs = pair_sums(chosen_log_probs, rejected_log_probs)
    nll = torch.stack([nll_sum.double(), nll_sum.new_full((), nll_tokens, dtype=torch.float64)])
    if aux_loss is None:
        aux = torch.zeros_like(nll)
    else:
        n_pairs = pairs[0]
        aux = torch.stack([aux_loss.detach().double() * n_pairs, n_pairs])
    return torch.cat([pairs, nll, aux])


@dataclass(frozen=True)
class OrpoWeights:
    """Weights of the odds-ratio term and of the router loss in the total loss."""

    beta: float
    router: float


def metrics_from_sums(sums: Sequence[float], weights: OrpoWeights) -> dict[str, float]:
    """Compute the metrics from total sums, dividing once at the end.

    Args:
        sums: vectors of `batch_sums`, added up over microbatches, steps and workers.
        weights: weights of the loss terms.

    Source:
        Names and meanings are those of TRL's ORPOTrainer.
    """
    pairs, chosen, rejected, correct, log_odds, log_sigmoid, nll, nll_tokens, aux, aux_pairs = sums
    nll_loss = nll / nll_tokens
    terms = [nll_loss, -weights.beta * log_sigmoid / pairs]
    metrics = {
        "rewards/chosen": weights.beta * chosen / pairs,
        "rewards/rejected": weights.beta * rejected / pairs,
        "rewards/accuracies": correct / pairs,
        "rewards/margins": weights.beta * (chosen - rejected) / pairs,
        "log_odds_chosen": log_odds / pairs,
        "log_odds_ratio": log_sigmoid / pairs,
        "nll_loss": nll_loss,
        "logps/chosen": chosen / pairs,
        "logps/rejected": rejected / pairs,
    }
    if aux_pairs:
        metrics["aux_loss"] = aux / aux_pairs
        terms.append(weights.router * aux / aux_pairs)
    return {"loss": fsum(terms)} | metrics
