"""Statistics of pair scores with confidence intervals; on the driver and rank 0."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Column = npt.NDArray[np.float64]
N_RESAMPLES, COVERAGE = 1000, 0.95
N_DRAWN = 10_000


@dataclass(frozen=True)
class Estimate:
    """A statistic of a sample of prompts, with its confidence interval."""

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

    @staticmethod
    def from_table(table: pa.Table) -> "Scores":
        """The columns of a table of `evaluation.SCHEMA`, or of `scores.parquet`."""
        names = ("logps_chosen", "logps_rejected", "log_odds", "chosen_tokens", "rejected_tokens")
        columns = [table[name].to_numpy().astype(np.float64) for name in names]
        prompts = np.unique(table["prompt_key"].to_numpy(), return_inverse=True)[1]
        return Scores(prompts.astype(np.int64), *columns)

    def only(self, members: npt.NDArray[np.int64]) -> "Scores":
        """Some of the pairs, by their indices."""
        columns = {name: column[members] for name, column in vars(self).items()}
        columns["prompts"] = np.unique(columns["prompts"], return_inverse=True)[1]
        return Scores(**columns)

    def sums(self) -> npt.NDArray[np.float64]:
        """Sums from which the statistics are computed: (prompts, names of `_SUMS`)."""
        right = (self.chosen > self.rejected).astype(float)
        longer = (self.chosen_tokens > self.rejected_tokens).astype(float)
        shorter = (self.chosen_tokens < self.rejected_tokens).astype(float)
        columns: dict[str, Column] = {
            "pairs": np.ones_like(right),
            "right": right,
            "margin": self.chosen - self.rejected,
            "log_odds": self.log_odds,
            "odds_ratio_loss": np.logaddexp(0.0, -self.log_odds),
            "nll": -self.chosen * self.chosen_tokens,
            "tokens": self.chosen_tokens,
            "longer": longer,
            "longer_right": longer * right,
            "shorter": shorter,
            "shorter_right": shorter * right,
            "chosen": self.chosen,
            "rejected": self.rejected,
        }
        totals = [np.bincount(self.prompts, columns[name]) for name in _SUMS]
        return np.stack(totals, axis=1)


Sums = npt.NDArray[np.float64]  # [..., _SUMS]
_SUMS = (
    *("pairs", "right", "margin", "log_odds", "odds_ratio_loss", "nll", "tokens"),
    *("longer", "longer_right", "shorter", "shorter_right", "chosen", "rejected"),
)


def _ratio(above: str, below: str, sums: Sums) -> Column:
    """One sum over another; not a number where there is nothing to divide by."""
    top, bottom = sums[..., _SUMS.index(above)], sums[..., _SUMS.index(below)]
    ratio: Column = np.divide(top, bottom, out=np.full(bottom.shape, np.nan), where=bottom > 0)
    return ratio


def _a_pair(name: str) -> Callable[[Sums], Column]:
    return partial(_ratio, name, "pairs")


STATISTICS: Mapping[str, Callable[[Sums], Column]] = {
    "accuracy": _a_pair("right"),
    "length_controlled_accuracy": lambda sums: (
        (_ratio("longer_right", "longer", sums) + _ratio("shorter_right", "shorter", sums)) / 2
    ),
    "margin": _a_pair("margin"),
    "log_odds": _a_pair("log_odds"),
    "odds_ratio_loss": _a_pair("odds_ratio_loss"),
    "nll": partial(_ratio, "nll", "tokens"),
    "perplexity": lambda sums: np.exp(_ratio("nll", "tokens", sums)),
    "logps_chosen": _a_pair("chosen"),
    "logps_rejected": _a_pair("rejected"),
}
"""Statistics as functions of sums over pairs; margin, NLL and log-probabilities are in nats.

`length_controlled_accuracy` gives pairs whose chosen answer is the longer one and pairs whose
chosen answer is the shorter one the same weight, whatever their number. NLL and perplexity are of
the tokens of chosen answers.
"""


def estimates(scores: Scores, seed: int = 0) -> dict[str, Estimate]:
    """Every statistic with its interval, by resampling prompts.

    Pairs of one prompt are not independent, so prompts are drawn, each with all its pairs
    (the percentile bootstrap of clusters; Efron and Tibshirani 1993, chapter 13). Of more than
    `N_DRAWN` prompts, clusters of several random ones are drawn, see `_clustered`.
    """
    sums = scores.sums()
    drawn = _resampled(sums, seed)
    whole = sums.sum(axis=0)
    return {
        name: _estimate(statistic(whole), statistic(drawn))
        for name, statistic in STATISTICS.items()
    }


@dataclass(frozen=True)
class Difference:
    """The difference of two models in a statistic, on the same pairs.

    Args:
        value: of the model, less the baseline's.
        low: end of its interval.
        high: other end of it.
        p_value: how often signs drawn at random, a prompt each, give so large a difference.
    """

    value: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class SetEvaluation:
    """What one model makes of one evaluation set.

    Args:
        pairs: how many.
        figures: by name, see `STATISTICS`.
        subsets: the same for the pairs of each value of `eval_subset_column`.
        lengths: the same for four groups of pairs of about the same length, the shortest first.
        differences: from the baseline, if there is one, by name.
        scores: the file with a row a pair.
        pairs_compared: pairs of which the differences are: those that both tokenizers take.
    """

    pairs: int
    figures: dict[str, Estimate]
    subsets: dict[str, dict[str, Any]]
    lengths: dict[str, dict[str, Any]]
    differences: dict[str, Difference]
    scores: str
    pairs_compared: int = 0


@dataclass(frozen=True)
class EvaluationResult:
    """A finished evaluation.

    Args:
        run_directory: absolute path or URL; `evaluation.json` in it holds the same.
        sets: by name of the evaluation set; `eval` where it has none.
        metrics: the means that training logs of an evaluation, each name after the set's prefix
            (`eval_`, `eval_<name>_`).
    """

    run_directory: str
    sets: dict[str, SetEvaluation]
    metrics: dict[str, float]


# Statistics by which models are compared: each is a mean of ratios of sums.
_PAIRED: Mapping[str, tuple[tuple[str, str], ...]] = {
    "accuracy": (("right", "pairs"),),
    "length_controlled_accuracy": (("longer_right", "longer"), ("shorter_right", "shorter")),
    "log_odds": (("log_odds", "pairs"),),
    "margin": (("margin", "pairs"),),
    "logps_chosen": (("chosen", "pairs"),),
    "logps_rejected": (("rejected", "pairs"),),
}


def _parts(name: str, sums: Sums) -> Column:
    """What every prompt adds to a statistic: their sum is the statistic of all."""
    whole, ratios = sums.sum(axis=0), _PAIRED[name]
    parts = [sums[:, _SUMS.index(above)] / whole[_SUMS.index(below)] for above, below in ratios]
    mean: Column = np.sum(parts, axis=0) / len(parts)
    return mean


def differences(model: Scores, baseline: Scores, seed: int = 0) -> dict[str, Difference]:
    """Paired comparison of two models: a bootstrap interval and a sign-flip test, by prompt.

    Length-controlled accuracy is left out where one of its two kinds of pairs is missing.

    Raises:
        ValueError: when the scores are not of the same pairs.
    """
    if not np.array_equal(model.prompts, baseline.prompts):
        raise ValueError("the scores of model and baseline are not of the same pairs")
    # One seed: the same clusters and the same draws.
    ours, theirs = (_clustered(scores.sums(), seed) for scores in (model, baseline))
    our_draws, their_draws = _resampled(ours, seed), _resampled(theirs, seed)
    found = {}
    for name in _PAIRED:
        statistic = STATISTICS[name]
        value = statistic(ours.sum(axis=0)) - statistic(theirs.sum(axis=0))
        if np.isnan(value):
            continue
        spread = statistic(our_draws) - statistic(their_draws)
        p_value = _sign_flip(_parts(name, ours) - _parts(name, theirs), seed)
        estimate = _estimate(value, spread)
        found[name] = Difference(estimate.value, estimate.low, estimate.high, p_value)
    return found


def _clustered(sums: Sums, seed: int) -> Sums:
    """Sums of at most `N_DRAWN` clusters of prompts, put together at random; few prompts as is.

    All statistics are ratios of sums, and the prompts of a cluster are independent, so that the
    squares of the clusters' residuals add up to those of the prompts: intervals are as wide. With
    10,000 clusters their widths differ by under 1 % (1 / sqrt(2 N_DRAWN)) from those of drawing
    prompts, which 1,000 resamples decide to about 5 % only. Signs that are flipped by cluster are a
    subgroup of those by prompt, under which the test is as exact.
    """
    n_prompts = len(sums)
    if n_prompts <= N_DRAWN:
        return sums
    order = np.random.default_rng([seed, n_prompts]).permutation(n_prompts)
    which = order % N_DRAWN
    return np.stack([np.bincount(which, column) for column in sums.T], axis=1)


def _resampled(sums: Sums, seed: int) -> Sums:
    """Sums over prompts, or clusters of them, drawn with replacement; a row a resample."""
    sums = _clustered(sums, seed)
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
        bool(abs((each * rng.choice((-1.0, 1.0), size=len(each))).sum()) >= observed * (1 - 1e-9))
        for _ in range(N_RESAMPLES)
    )
    return (1 + at_least) / (1 + N_RESAMPLES)
