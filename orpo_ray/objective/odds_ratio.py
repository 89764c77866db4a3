"""The odds-ratio term of ORPO: log odds ratio, loss and gradient, and sums for metrics."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

LARGEST_SLOPE = 2.0**24
"""Bound on |d log1mexp(x) / dx| for a rejected answer, whose true derivative diverges as x -> 0.

1 / 2**24 is half the spacing of fp32 just below 1: a mean log-probability closer to 0 than that
belongs to a probability that fp32 cannot tell from 1.
"""
_AT_LARGEST_SLOPE = math.log(
    -math.expm1(-1 / LARGEST_SLOPE)
)  # log(1 - e^x) at the x where the bound takes effect

N_PAIR_SUMS = 6


class PairTerms(NamedTuple):
    """The unweighted odds-ratio term of each pair, and its derivatives.

    Args:
        values: logsigmoid(log odds), at most 0.
        chosen_slopes: derivative with respect to the chosen answer's mean log-probability.
        rejected_slopes: the same for the rejected answer, bounded by `LARGEST_SLOPE`.
    """

    values: Float[Tensor, " pairs"]
    chosen_slopes: Float[Tensor, " pairs"]
    rejected_slopes: Float[Tensor, " pairs"]


def _log1mexp(x: Tensor) -> Tensor:
    below_zero = x.clamp(max=-torch.finfo(x.dtype).tiny)
    # Maechler (2012): log1p(-exp(x)) loses precision near 0, log(-expm1(x)) far from it.
    near = torch.log(-torch.expm1(below_zero))
    far = torch.log1p(-torch.exp(below_zero))
    return torch.where(below_zero > -0.6931471805599453, near, far)


class _Log1mExp(torch.autograd.Function):
    """log(1 - e^x) with a derivative that is finite everywhere, also at x = 0."""

    @staticmethod
    def forward(x: Tensor, largest_slope: float) -> Tensor:
        return _log1mexp(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        x, ctx.largest_slope = inputs
        ctx.save_for_backward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        below_zero = x.clamp(max=-max(torch.finfo(x.dtype).tiny, 1.0 / ctx.largest_slope))
        return grad * torch.exp(below_zero) / torch.expm1(below_zero), None


def log1mexp(x: Float[Tensor, "*n"], largest_slope: float = LARGEST_SLOPE) -> Float[Tensor, "*n"]:
    """log(1 - e^x) for x <= 0, finite in value and gradient for every such x.

    At x = 0, where log(1 - e^x) is minus infinity, the closest number below 0 is used instead.

    Args:
        x: log-probabilities, in nats, at most 0.
        largest_slope: bound on the absolute value of the derivative; `inf` for none.

    Source:
        Value: M. Maechler, "Accurately computing log(1 - exp(-|a|))", 2012.
    """
    result: Tensor = _Log1mExp.apply(x, largest_slope)  # type: ignore[no-untyped-call]
    return result


def log_odds(
    chosen_log_probs: Float[Tensor, " pairs"], rejected_log_probs: Float[Tensor, " pairs"]
) -> Float[Tensor, " pairs"]:
    """log(odds(chosen) / odds(rejected)), with odds(y) = p / (1 - p) and p = e^(mean log-prob).

    The derivative of the loss by `chosen` has a finite limit at 0, since the sigmoid in front falls
    as fast as the derivative of log1mexp grows, so it is exact. The one by `rejected` diverges at 0
    and is bounded by `LARGEST_SLOPE`.

    Args:
        chosen_log_probs: mean log-probability per token of the chosen answers, in nats.
        rejected_log_probs: the same for the rejected answers.

    Source:
        ORPO, arXiv:2403.07691, equations 4 and 7.
    """
    return (chosen_log_probs - rejected_log_probs) - (
        log1mexp(chosen_log_probs, largest_slope=float("inf")) - log1mexp(rejected_log_probs)
    )


def log_sigmoid_log_odds(
    chosen_log_probs: Float[Tensor, " pairs"], rejected_log_probs: Float[Tensor, " pairs"]
) -> Float[Tensor, " pairs"]:
    """The unweighted odds-ratio term logsigmoid(log odds): at most 0, higher is better."""
    return functional.logsigmoid(log_odds(chosen_log_probs, rejected_log_probs))


def pair_terms(log_probs: Float[Tensor, "2 pairs"]) -> PairTerms:
    """`log_sigmoid_log_odds` and its gradient in closed form, with a fifth of the kernel launches.

    With x = log odds: d logsigmoid(x) / dx = sigmoid(-x), dx / d(chosen) = 1 / (1 - e^chosen) and
    dx / d(rejected) = -1 / (1 - e^rejected), bounded as in `log_odds`. The products are formed from
    logarithms, since sigmoid(-x) vanishes in fp32 where its product does not.

    Args:
        log_probs: mean log-probabilities of chosen (first row) and rejected answers, in nats.
    """
    chosen, rejected = _log1mexp(log_probs)
    ratios = (log_probs[0] - log_probs[1]) - (chosen - rejected)
    outer = functional.logsigmoid(-ratios)
    return PairTerms(
        values=functional.logsigmoid(ratios),
        chosen_slopes=torch.exp(outer - chosen),
        rejected_slopes=-torch.exp(outer - rejected.clamp(min=_AT_LARGEST_SLOPE)),
    )


def pair_sums(
    chosen_log_probs: Float[Tensor, " pairs"], rejected_log_probs: Float[Tensor, " pairs"]
) -> Float[Tensor, "6"]:
    """Sum over pairs what the metrics need; stays on the device.

    Returns:
        [pairs, sum chosen, sum rejected, pairs with chosen > rejected, sum log odds,
        sum logsigmoid(log odds)], in float64 so that sums of many steps stay exact.
    """
    ratios = log_odds(chosen_log_probs, rejected_log_probs)
    each = (
        torch.ones_like(ratios),
        chosen_log_probs,
        rejected_log_probs,
        (chosen_log_probs > rejected_log_probs).to(ratios.dtype),
        ratios,
        functional.logsigmoid(ratios),
    )
    return torch.stack(each).sum(dim=1, dtype=torch.float64)
