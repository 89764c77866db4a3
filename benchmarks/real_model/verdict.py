"""What the scores of held-out pairs say: every side with intervals, and two sides pair by pair."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from orpo_ray.runs.statistics import (
    COVERAGE,
    N_RESAMPLES,
    STATISTICS,
    Difference,
    Estimate,
    Scores,
    differences,
)
from real_model.plan import SIGNIFICANCE

CLAIMED = ("log_odds", "margin")


@dataclass(frozen=True)
class Comparison:
    """One kind of side less another, on the same pairs, over all their seeds.

    Args:
        tested: statistics with a p-value.
        others: statistics with an interval only.
        by_seed: the log odds' difference, a value a seed.
    """

    tested: Mapping[str, Difference]
    others: Mapping[str, Estimate]
    by_seed: Sequence[float]

    @property
    def holds(self) -> bool:
        """Whether all that the claim names is higher, and not by chance."""
        found = [self.tested[name] for name in CLAIMED]
        return all(d.value > 0 and d.p_value < SIGNIFICANCE for d in found)


def read_scores(file: Path) -> Scores:
    """Scores of one evaluation, in the order of its rows."""
    return Scores.from_table(pq.read_table(file).sort_by("row"))


def over_seeds(seeds: Sequence[Scores]) -> Scores:
    """The scores of several runs as one: a prompt has its pairs once a run.

    Statistics are then means over runs, and what is drawn or flipped is still a prompt.

    Raises:
        ValueError: when the scores are not of the same pairs.
    """
    if any(not np.array_equal(seed.prompts, seeds[0].prompts) for seed in seeds):
        raise ValueError("the scores of the seeds are not of the same pairs")
    return Scores(*(np.concatenate([vars(s)[name] for s in seeds]) for name in vars(seeds[0])))


def compare(model: Sequence[Scores], baseline: Sequence[Scores], seed: int = 0) -> Comparison:
    """Compare two kinds of sides of as many seeds.

    Args:
        model: a run's scores a seed.
        baseline: the same of the other kind.
        seed: of resampling.

    Raises:
        ValueError: when the scores are not of the same pairs.
    """
    ours, theirs = over_seeds(model), over_seeds(baseline)
    tested = differences(ours, theirs, seed)
    names = [name for name in STATISTICS if name not in tested]
    others = {name: difference(ours, theirs, name, seed) for name in names}
    each = [float((a.log_odds - b.log_odds).mean()) for a, b in zip(model, baseline, strict=True)]
    return Comparison(tested, others, each)


def difference(model: Scores, baseline: Scores, name: str, seed: int = 0) -> Estimate:
    """The difference in any statistic with its interval, by drawing prompts for both at once."""
    statistic = STATISTICS[name]
    ours, theirs = model.sums(), baseline.sums()
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(N_RESAMPLES):
        prompts = rng.integers(len(ours), size=len(ours))
        drawn.append(statistic(ours[prompts].sum(axis=0)) - statistic(theirs[prompts].sum(axis=0)))
    tail = (1 - COVERAGE) / 2
    low, high = np.nanquantile(drawn, [tail, 1 - tail])
    value = statistic(ours.sum(axis=0)) - statistic(theirs.sum(axis=0))
    return Estimate(float(value), float(low), float(high))
