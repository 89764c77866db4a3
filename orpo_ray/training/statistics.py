"""What pair scores say of a model, with how sure that is; numpy only, on the driver."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Column = npt.NDArray[np.float64]
N_RESAMPLES, COVERAGE = 1000, 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure of a sample of prompts, and the interval that would hold that of all of them."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """Scores of pairs as columns.

    Args:
        prompts: a number for each pair, equal for pairs of one prompt, from 0 without gaps.
        chosen: mean log-probability a token of the chosen answer, in nats.
        rejected: the same of the rejected one.
        log_odds: of the pair.
        chosen_tokens: tokens of the chosen answer.
        rejected_tokens: the same of the rejected one.
    """

    prompts: npt.NDArray[np.int64]
    chosen: Column
    rejected: Column
    log_odds: Column
    chosen_tokens: Column
    rejected_tokens: Column

    def only(self, mask: npt.NDArray[np.bool_]) -> "Scores":
        """Some of the pairs."""
        columns = {name: column[mask] for name, column in vars(self).items()}
        columns["prompts"] = np.unique(columns["prompts"], return_inverse=True)[1]
        return Scores(**columns)

    def sums(self) -> npt.NDArray[np.float64]:
        """What every figure is a function of, a row a prompt: see `FIGURES`."""
        right = (self.chosen > self.rejected).astype(float)
        longer = (self.chosen_tokens > self.rejected_tokens).astype(float)
        shorter = (self.chosen_tokens < self.rejected_tokens).astype(float)
        columns = np.stack(
            [
                np.ones_like(right),
                right,
                self.chosen - self.rejected,
                self.log_odds,
                np.logaddexp(0.0, -self.log_odds),
                -self.chosen * self.chosen_tokens,
                self.chosen_tokens,
                longer,
                longer * right,
                shorter,
                shorter * right,
                self.chosen,
                self.rejected,
            ],
            axis=1,
        )
        totals = np.zeros((int(self.prompts.max(initial=-1)) + 1, columns.shape[1]))
        np.add.at(totals, self.prompts, columns)
        return totals


Sums = npt.NDArray[np.float64]  # [..., figures' columns]


def _balanced(s: Sums) -> Column:
    """The mean of the accuracies where the chosen answer is the longer and the shorter one."""
    longer = np.divide(s[..., 8], s[..., 7], out=np.full(s.shape[:-1], np.nan), where=s[..., 7] > 0)
    shorter = np.divide(
        s[..., 10], s[..., 9], out=np.full(s.shape[:-1], np.nan), where=s[..., 9] > 0
    )
    balanced: Column = (longer + shorter) / 2
    return balanced


FIGURES: Mapping[str, Callable[[Sums], Column]] = {
    "accuracy": lambda s: s[..., 1] / s[..., 0],
    "length_controlled_accuracy": _balanced,
    "margin": lambda s: s[..., 2] / s[..., 0],
    "log_odds": lambda s: s[..., 3] / s[..., 0],
    "odds_ratio_loss": lambda s: s[..., 4] / s[..., 0],
    "nll": lambda s: s[..., 5] / s[..., 6],
    "perplexity": lambda s: np.exp(s[..., 5] / s[..., 6]),
    "logps_chosen": lambda s: s[..., 11] / s[..., 0],
    "logps_rejected": lambda s: s[..., 12] / s[..., 0],
}
"""Figures as functions of sums over pairs; margin, NLL and log-probabilities are in nats.

`length_controlled_accuracy` gives pairs whose chosen answer is the longer one and pairs whose
chosen answer is the shorter one the same weight, whatever their number. NLL and perplexity are of
the tokens of chosen answers.
"""


def estimates(scores: Scores, seed: int = 0) -> dict[str, Estimate]:
    """Every figure with its interval, by resampling prompts.

    Pairs of one prompt are not independent, so prompts are drawn, each with all its pairs
    (the percentile bootstrap of clusters; Efron and Tibshirani 1993, chapter 13).
    """
    sums = scores.sums()
    drawn = _resampled(sums, seed)
    whole = sums.sum(axis=0)
    return {name: _estimate(figure(whole), figure(drawn)) for name, figure in FIGURES.items()}


@dataclass(frozen=True)
class Difference:
    """How two models differ in a figure on the same pairs.

    Args:
        value: the model's figure less the baseline's.
        low: end of its interval.
        high: other end of it.
        p_value: how often signs drawn at random, a prompt each, give so large a difference.
    """

    value: float
    low: float
    high: float
    p_value: float


PAIRED = ("accuracy", "margin", "log_odds")


def differences(model: Scores, baseline: Scores, seed: int = 0) -> dict[str, Difference]:
    """Paired comparison of two models: a bootstrap interval and a sign-flip test, by prompt.

    Raises:
        ValueError: when the scores are not of the same pairs.
    """
    if not np.array_equal(model.prompts, baseline.prompts):
        raise ValueError("the scores of model and baseline are not of the same pairs")
    ours, theirs = model.sums(), baseline.sums()
    both = np.concatenate([ours, theirs], axis=1)
    drawn, width = _resampled(both, seed), ours.shape[1]
    found = {}
    for name in PAIRED:
        figure = FIGURES[name]
        value = figure(ours.sum(axis=0)) - figure(theirs.sum(axis=0))
        spread = figure(drawn[:, :width]) - figure(drawn[:, width:])
        column = {"accuracy": 1, "margin": 2, "log_odds": 3}[name]
        p_value = _sign_flip(ours[:, column] - theirs[:, column], seed)
        estimate = _estimate(value, spread)
        found[name] = Difference(estimate.value, estimate.low, estimate.high, p_value)
    return found


def _resampled(sums: Sums, seed: int) -> Sums:
    """Sums over prompts drawn with replacement, a row a resample."""
    rng = np.random.default_rng(seed)
    n_prompts = len(sums)
    rows = [
        np.bincount(rng.integers(n_prompts, size=n_prompts), minlength=n_prompts) @ sums
        for _ in range(N_RESAMPLES)
    ]
    return np.stack(rows)


def _estimate(value: Column, drawn: Column) -> Estimate:
    tail = (1 - COVERAGE) / 2
    known = drawn[np.isfinite(drawn)]
    low, high = np.quantile(known, [tail, 1 - tail]) if len(known) else (np.nan, np.nan)
    return Estimate(float(value), float(low), float(high))


def _sign_flip(each: Column, seed: int) -> float:
    """Two-sided p-value of a sum of differences, under signs that are as likely either way."""
    rng = np.random.default_rng(seed)
    observed = abs(each.sum())
    at_least = sum(
        bool(abs((each * rng.choice((-1.0, 1.0), size=len(each))).sum()) >= observed - 1e-12)
        for _ in range(N_RESAMPLES)
    )
    return (1 + at_least) / (1 + N_RESAMPLES)
