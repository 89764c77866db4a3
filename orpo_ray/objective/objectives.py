"""The objectives: what is minimised, as pure functions of the log-probabilities of pairs.

To add one: a function here that returns its `Objective`, its name in `OBJECTIVES`, its settings in
`config.train`, and a row in `tests/objective/test_objectives.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from orpo_ray.objective.odds_ratio import PairTerms, pair_terms


class Answers(NamedTuple):
    """What an objective sees of some pairs; the first row is of chosen answers.

    Args:
        log_probs: mean log-probabilities per token, in nats.
        lengths: numbers of tokens.
    """

    log_probs: Float[Tensor, "2 pairs"]
    lengths: Float[Tensor, "2 pairs"]


@dataclass(frozen=True)
class Objective:
    """loss = nll_weight * NLL - pair_weight * mean over pairs of `terms` (+ router loss).

    Args:
        nll_weight: weight of the NLL of prompts and chosen answers, or of chosen answers alone.
        pair_weight: weight of the pairs' term.
        reward_scale: factor that makes a mean log-probability a reward, beta where there is one.
        terms: each pair's term and its derivatives; None where rejected answers are not computed.
    """

    nll_weight: float
    pair_weight: float
    reward_scale: float
    terms: Callable[[Answers], PairTerms] | None


class ObjectiveSettings(Protocol):
    """The settings that objectives are made of; `config.train.OrpoSection` has them."""

    @property
    def objective(self) -> str: ...  # noqa: D102
    @property
    def beta(self) -> float: ...  # noqa: D102
    @property
    def loss_type(self) -> str: ...  # noqa: D102
    @property
    def simpo_gamma(self) -> float: ...  # noqa: D102
    @property
    def cpo_alpha(self) -> float: ...  # noqa: D102
    @property
    def label_smoothing(self) -> float: ...  # noqa: D102


def orpo(beta: float) -> Objective:
    """ORPO: the NLL, and log sigmoid of the log odds ratio.

    Source:
        arXiv:2403.07691, equations 6 and 7.
    """
    return Objective(1.0, beta, beta, lambda answers: pair_terms(answers.log_probs))


def simpo(beta: float, gamma: float, cpo_alpha: float, label_smoothing: float = 0.0) -> Objective:
    """SimPO: log sigmoid of the margin of mean log-probabilities, less a target.

    Args:
        beta: scale of the margin.
        gamma: the target, after scaling.
        cpo_alpha: weight of the NLL; SimPO itself has none.
        label_smoothing: share of pairs that are taken to be labelled the wrong way round.

    Source:
        arXiv:2405.14734, equation 6; with the NLL it is TRL's CPO-SimPO.
    """

    def terms(answers: Answers) -> PairTerms:
        chosen, rejected = answers.log_probs
        values, slopes = _log_sigmoid(beta * (chosen - rejected) - gamma, label_smoothing)
        return PairTerms(values, beta * slopes, -beta * slopes)

    return Objective(cpo_alpha, 1.0, beta, terms)


def cpo(beta: float, cpo_alpha: float, loss_type: str, label_smoothing: float = 0.0) -> Objective:
    """CPO: a term of the margin of summed log-probabilities, and the NLL.

    Args:
        beta: scale of the margin; with `ipo` the regularization tau.
        cpo_alpha: weight of the NLL.
        loss_type: `sigmoid`, `hinge`, or `ipo`, whose margin is one of mean log-probabilities.
        label_smoothing: of `sigmoid`; share of pairs that are labelled the wrong way round.

    Source:
        arXiv:2401.08417, equation 3 (sigmoid); arXiv:2305.10425 (hinge); arXiv:2310.12036, equation
        17 (ipo); each as in TRL's CPOTrainer.
    """

    def summed(answers: Answers) -> PairTerms:
        chosen, rejected = answers.log_probs * answers.lengths
        margins = beta * (chosen - rejected)
        if loss_type == "hinge":
            values, slopes = -torch.relu(1 - margins), (margins < 1).to(margins.dtype)
        else:
            values, slopes = _log_sigmoid(margins, label_smoothing)
        slopes = beta * slopes
        return PairTerms(values, slopes * answers.lengths[0], -slopes * answers.lengths[1])

    def squared(answers: Answers) -> PairTerms:
        chosen, rejected = answers.log_probs
        errors = chosen - rejected - 1 / (2 * beta)
        return PairTerms(-errors.square(), -2 * errors, 2 * errors)

    return Objective(cpo_alpha, 1.0, beta, squared if loss_type == "ipo" else summed)


def sft(beta: float) -> Objective:
    """Supervised fine-tuning: the NLL alone; `beta` scales rewards in evaluations and no more."""
    return Objective(1.0, 0.0, beta, None)


def _log_sigmoid(margins: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Log sigmoid(margin), with smoothed labels, and its derivative."""
    values, slopes = functional.logsigmoid(margins), torch.sigmoid(-margins)
    if smoothing:
        values = (1 - smoothing) * values + smoothing * functional.logsigmoid(-margins)
        slopes = slopes - smoothing
    return values, slopes


OBJECTIVES: Mapping[str, Callable[[ObjectiveSettings], Objective]] = {
    "orpo": lambda s: orpo(s.beta),
    "simpo": lambda s: simpo(s.beta, s.simpo_gamma, s.cpo_alpha, s.label_smoothing),
    "cpo": lambda s: cpo(s.beta, s.cpo_alpha, s.loss_type, s.label_smoothing),
    "sft": lambda s: sft(s.beta),
}


def objective_of(settings: ObjectiveSettings) -> Objective:
    """The objective that the settings name."""
    return OBJECTIVES[settings.objective](settings)
