"""The odds-ratio term, against exact arithmetic and against TRL's formula."""

import mpmath
import pytest
import torch
from trl.experimental.orpo.orpo_trainer import log1mexp as trl_log1mexp

from orpo_ray.objective.odds_ratio import (
    LARGEST_SLOPE,
    log1mexp,
    log_odds,
    log_sigmoid_log_odds,
    pair_sums,
    pair_terms,
)

GRID = [-100.0, -20.0, -5.0, -1.0, -0.7, -0.6931, -0.5, -0.1, -1e-3, -1e-6, -2e-8, -1e-12, -1e-30]


def exact_log1mexp(x: float) -> float:
    with mpmath.workdps(60):
        return float(mpmath.log(1 - mpmath.exp(mpmath.mpf(x))))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-7), (torch.float64, 1e-15)])
def test_log1mexp_is_exact_to_rounding(dtype, tolerance):
    """Against 60 digits, at the very number that the type holds."""
    x = torch.tensor(GRID, dtype=dtype)
    expected = torch.tensor([exact_log1mexp(value.item()) for value in x], dtype=torch.float64)
    torch.testing.assert_close(log1mexp(x).double(), expected, rtol=tolerance, atol=1e-37)


def test_log1mexp_has_its_derivative():
    """d/dx log(1 - e^x) = -e^x / (1 - e^x) = 1 / (1 - e^-x), where the bound is out of reach."""
    x = torch.tensor([-50.0, -3.0, -0.7, -0.6, -1e-3, -1e-6], dtype=torch.float64)
    x.requires_grad_()
    log1mexp(x).sum().backward()
    torch.testing.assert_close(x.grad, -1 / torch.expm1(-x.detach()), rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(log1mexp, (x[:5],), eps=1e-9, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_are_finite_for_every_log_prob(dtype):
    values = torch.tensor([*GRID, -3e-8, -1e-8, -1e-38, 0.0], dtype=dtype)
    chosen, rejected = torch.meshgrid(values, values, indexing="ij")
    chosen = chosen.reshape(-1).clone().requires_grad_()
    rejected = rejected.reshape(-1).clone().requires_grad_()
    term = log_sigmoid_log_odds(chosen, rejected)
    term.sum().backward()
    for tensor in (term, chosen.grad, rejected.grad):
        assert tensor.isfinite().all()
    assert rejected.grad.abs().max() <= LARGEST_SLOPE * 1.0001


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_pair_terms_are_those_of_autograd(dtype, tolerance):
    """Also where slopes are bounded, and for answers that are certain."""
    values = torch.tensor([*GRID, -3e-8, -1e-8, -1e-38, 0.0], dtype=dtype)
    chosen, rejected = torch.meshgrid(values, values, indexing="ij")
    chosen = chosen.reshape(-1).clone().requires_grad_()
    rejected = rejected.reshape(-1).clone().requires_grad_()
    values = log_sigmoid_log_odds(chosen, rejected)
    values.sum().backward()
    found = pair_terms(torch.stack([chosen, rejected]).detach())
    for term, expected in zip(found, (values, chosen.grad, rejected.grad), strict=True):
        torch.testing.assert_close(term, expected.detach(), rtol=tolerance, atol=tolerance)


def test_trl_is_not_finite_where_this_is():
    """TRL's gradient at -1e-8 in fp32: the branch that is not taken gives 0 x inf."""
    x = torch.tensor([-1e-8], requires_grad=True)
    trl_log1mexp(x).sum().backward()
    assert not x.grad.isfinite().all()


def test_the_chosen_side_tends_to_its_limit():
    """With w -> 0, log odds -> log(odds(p_w) / odds(p_l)) and the loss -log sigmoid of it.

    d(loss)/dw = -sigmoid(-log odds) / (1 - e^w) -> -odds(p_l), as 1 - e^w cancels.
    """
    rejected = torch.tensor([-1.0], dtype=torch.float64)
    odds = torch.exp(rejected) / (1 - torch.exp(rejected))
    for value in (-1e-4, -1e-8, -1e-14, -1e-30):
        chosen = torch.tensor([value], dtype=torch.float64, requires_grad=True)
        (-log_sigmoid_log_odds(chosen, rejected)).sum().backward()
        torch.testing.assert_close(chosen.grad, -odds, rtol=2e-4, atol=0)


def test_equal_answers_have_no_odds():
    """Log odds are 0, so logsigmoid(0) = -ln 2."""
    x = torch.tensor([-2.0, -0.01])
    torch.testing.assert_close(log_odds(x, x), torch.zeros(2))
    torch.testing.assert_close(log_sigmoid_log_odds(x, x), torch.full((2,), -0.69314718))


def test_values_equal_trl_where_trl_is_finite():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = -torch.rand(2, 1000, generator=generator) * 8 - 1e-3
    expected = (chosen - rejected) - (trl_log1mexp(chosen) - trl_log1mexp(rejected))
    torch.testing.assert_close(log_odds(chosen, rejected), expected, rtol=1e-5, atol=1e-5)


def test_pair_sums_of_two_pairs():
    """With w = ln 1/2, l = ln 1/4: odds 1 and 1/3, log odds ln 3, logsigmoid = ln(3/4).

    The other way round: -ln 3 and ln(1/4). Sums: 2 pairs, -3 ln 2 a side, one correct, 0, and
    ln(3/16).
    """
    half, quarter = torch.log(torch.tensor([0.5, 0.25], dtype=torch.float64))
    sums = pair_sums(torch.stack([half, quarter]), torch.stack([quarter, half]))
    ln2 = 0.6931471805599453
    expected = torch.tensor([2, -3 * ln2, -3 * ln2, 1, 0, -1.6739764335716716])
    torch.testing.assert_close(sums, expected.double())
