"""Metrics from sums, and the router loss."""

import math

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from orpo_ray.objective.head import HeadOutput
from orpo_ray.objective.metrics import LossWeights, batch_sums, metrics_from_sums
from orpo_ray.objective.objectives import orpo
from orpo_ray.objective.odds_ratio import log_sigmoid_log_odds
from orpo_ray.objective.router import router_loss


def sums_of(nll_sum, nll_tokens, log_probs, aux_loss):
    """The sums of a row whose pairs have these log-probabilities, with ORPO's term."""
    log_probs = torch.tensor(log_probs)
    head = HeadOutput(
        loss=torch.tensor(0.0),
        nll_sum=torch.tensor(nll_sum),
        term_sum=log_sigmoid_log_odds(*log_probs).sum(),
        completion_log_probs=log_probs.flatten(),
    )
    return batch_sums(head, nll_tokens, log_probs, log_probs.shape[1], aux_loss)


def test_metrics_divide_once_over_everything():
    """One row with 1 pair and 4 NLL tokens, one with 2 pairs and 2: nothing is a mean of means.

    Chosen means -1, -2, -3 (mean -2), rejected all -2: one pair of three is right. NLL (8 + 1) / 6
    = 1.5. Router losses 1 and 2.5 count once a pair: (1 + 2 x 2.5) / 3 = 2.
    """
    first = sums_of(8.0, 4, [[-1.0], [-2.0]], torch.tensor(1.0))
    second = sums_of(1.0, 2, [[-2.0, -3.0], [-2.0, -2.0]], torch.tensor(2.5))
    metrics = metrics_from_sums((first + second).tolist(), LossWeights(orpo(0.5), router=0.1))
    assert metrics["nll_loss"] == pytest.approx(1.5)
    assert metrics["aux_loss"] == pytest.approx(2.0)
    assert metrics["logps/chosen"] == pytest.approx(-2.0)
    assert metrics["rewards/chosen"] == pytest.approx(-1.0)
    assert metrics["rewards/margins"] == pytest.approx(0.0)
    assert metrics["rewards/accuracies"] == pytest.approx(1 / 3)

    def odds(w):
        return math.exp(w) / (1 - math.exp(w))

    log_odds = [math.log(odds(w) / odds(-2)) for w in (-1, -2, -3)]
    ratio = sum(-math.log1p(math.exp(-x)) for x in log_odds) / 3
    assert metrics["log_odds_chosen"] == pytest.approx(sum(log_odds) / 3)
    assert metrics["log_odds_ratio"] == pytest.approx(ratio)
    assert metrics["loss"] == pytest.approx(1.5 - 0.5 * ratio + 0.1 * 2.0)


def test_without_a_router_there_is_no_aux_loss():
    sums = sums_of(1.0, 1, [[-1.0], [-2.0]], None)
    assert "aux_loss" not in metrics_from_sums(sums.tolist(), LossWeights(orpo(0.1), 0.0))


def test_router_loss_counts_a_shared_token_as_often_as_padding_would():
    """Tokens with multiplicity 2, 2, 1 against the same tokens written out, in transformers."""
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2)]
    written_out = tuple(layer[[0, 1, 0, 1, 2]] for layer in layers)
    expected = load_balancing_loss_func(written_out, num_experts=4, top_k=2)
    loss = router_loss(layers, torch.tensor([2.0, 2.0, 1.0]), experts_per_token=2)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
