"""The metrics, computed from sums that add up over microbatches, steps and workers."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum

import torch
from jaxtyping import Float
from torch import Tensor

from orpo_ray.objective.head import HeadOutput
from orpo_ray.objective.objectives import Objective
from orpo_ray.objective.odds_ratio import N_PAIR_SUMS, pair_sums

N_SUMS = N_PAIR_SUMS + 6


def batch_sums(
    output: HeadOutput,
    nll_tokens: int,
    log_probs: Float[Tensor, "2 compared"],
    n_pairs: int,
    aux_loss: Float[Tensor, ""] | None,
) -> Float[Tensor, "12"]:
    """Compute the sums of one packed row, a float64 vector on its device without a sync.

    Args:
        output: of the head.
        nll_tokens: number of tokens of its NLL.
        log_probs: mean log-probability per token of the chosen (first row) and rejected answer of
            each pair that has both, in nats.
        n_pairs: number of pairs, with or without a rejected answer.
        aux_loss: router loss of the row; None without experts.
    """
    compared = pair_sums(*log_probs)
    zero = compared.new_zeros(())
    pairs = compared[0] if log_probs.shape[1] == n_pairs else zero + n_pairs
    aux = (zero, zero) if aux_loss is None else (aux_loss.detach().double() * pairs, pairs)
    nll = (output.nll_sum.double(), zero + nll_tokens)
    return torch.cat([compared, torch.stack([*nll, *aux, output.term_sum.double(), pairs])])


def sums_of_checkpoint(sums: Sequence[float]) -> list[float]:
    """Sums as they are now, of those in a checkpoint of a version that knew ORPO alone."""
    if len(sums) == N_SUMS:
        return list(sums)
    return [*sums, sums[N_PAIR_SUMS - 1], sums[0]]


@dataclass(frozen=True)
class LossWeights:
    """The objective and the weight of the router loss, which make up the total loss."""

    objective: Objective
    router: float


def metrics_from_sums(sums: Sequence[float], weights: LossWeights) -> dict[str, float]:
    """Compute the metrics from total sums, dividing once at the end.

    Names and meanings are the same for every objective. Those of two answers are of the pairs that
    have both, and are left out where there are none.

    Args:
        sums: vectors of `batch_sums`, added up over microbatches, steps and workers.
        weights: weights of the loss terms.

    Source:
        Names and meanings are those of TRL's ORPOTrainer.
    """
    compared, nll, nll_tokens, aux, aux_pairs, terms, pairs = sums[0], *sums[N_PAIR_SUMS:]
    objective = weights.objective
    nll_loss = nll / nll_tokens
    loss = [objective.nll_weight * nll_loss]
    if objective.pair_weight:
        loss.append(-objective.pair_weight * terms / pairs)
    metrics = _of_compared(sums[:N_PAIR_SUMS], objective.reward_scale) if compared else {}
    metrics["nll_loss"] = nll_loss
    if aux_pairs:
        metrics["aux_loss"] = aux / aux_pairs
        loss.append(weights.router * aux / aux_pairs)
    return {"loss": fsum(loss)} | metrics


def _of_compared(sums: Sequence[float], scale: float) -> dict[str, float]:
    """The metrics of `pair_sums`."""
    pairs, chosen, rejected, correct, log_odds, log_sigmoid = sums
    return {
        "rewards/chosen": scale * chosen / pairs,
        "rewards/rejected": scale * rejected / pairs,
        "rewards/accuracies": correct / pairs,
        "rewards/margins": scale * (chosen - rejected) / pairs,
        "log_odds_chosen": log_odds / pairs,
        "log_odds_ratio": log_sigmoid / pairs,
        "logps/chosen": chosen / pairs,
        "logps/rejected": rejected / pairs,
    }
