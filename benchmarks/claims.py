"""Deciding by numbers whether runs at several betas show what the ORPO paper says of its own.

A claim is held against the range over seeds: a difference counts when every seed has it, and when
the smallest is larger than the range (highest minus lowest) of what it is the difference of.
"""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """Means over pairs at one moment of a run; log-probabilities are a token's, all in nats."""

    step: int
    chosen: float
    rejected: float
    log_odds: float
    accuracy: float
    nll: float

    @property
    def margin(self) -> float:
        """Not multiplied by beta, so that it can be compared between betas."""
        return self.chosen - self.rejected


# The points of a run in order; runs by beta, one a seed.
Curve = Sequence[Point]
Curves = Mapping[float, Sequence[Curve]]


@dataclass(frozen=True)
class Claim:
    """What the paper says, whether the numbers show it, and the numbers."""

    says: str
    shown: bool
    numbers: str


def spread(values: Sequence[float]) -> float:
    """Highest minus lowest."""
    return max(values) - min(values)


def in_words(values: Sequence[float]) -> str:
    """The mean, and every seed's value where there are several."""
    each = ", ".join(f"{value:+.3f}" for value in values)
    return f"{statistics.mean(values):+.3f}" + (f" ({each})" if len(values) > 1 else "")


def all_claims(curves: Curves) -> list[Claim]:
    """Every claim; beta=0 and at least one other beta have to be there."""
    return [
        sft_raises_both(curves),
        orpo_separates(curves),
        rejected_fall(curves),
        log_odds_grow(curves),
        beta_trades(curves),
    ]


def sft_raises_both(curves: Curves) -> Claim:
    """Section 3 and figure 3: NLL on chosen answers alone raises the rejected ones too."""
    chosen = [curve[-1].chosen - curve[0].chosen for curve in curves[0.0]]
    rejected = [curve[-1].rejected - curve[0].rejected for curve in curves[0.0]]
    late = [curve[-1].rejected - curve[len(curve) // 2].rejected for curve in curves[0.0]]
    return Claim(
        "SFT alone (beta=0) raises rejected answers along with chosen ones",
        min(chosen + rejected) > 0,
        f"chosen {in_words(chosen)}, rejected {in_words(rejected)}; "
        f"of that in the second half, rejected {in_words(late)}",
    )


def orpo_separates(curves: Curves) -> Claim:
    """Section 7.2 and figure 7, by the margin beside that of SFT alone."""
    strongest = max(curves)
    with_it = [curve[-1].margin for curve in curves[strongest]]
    without = [curve[-1].margin for curve in curves[0.0]]
    more = [a - b for a, b in zip(with_it, without, strict=True)]
    noise = max(spread(with_it), spread(without))
    return Claim(
        f"ORPO (beta={strongest:g}) separates chosen from rejected answers more than SFT",
        min(more) > noise,
        f"margin {in_words(with_it)} against {in_words(without)}, which is {in_words(more)}; "
        f"range over seeds {noise:.3f}",
    )


def rejected_fall(curves: Curves) -> Claim:
    """Figure 7: rejected answers lose log-probability; chosen ones are where SFT brings them."""
    strongest = max(curves)
    ends = [curve[-1].rejected for curve in curves[strongest]]
    fall = [
        end - max(p.rejected for p in c) for end, c in zip(ends, curves[strongest], strict=True)
    ]
    sft = [curve[-1] for curve in curves[0.0]]
    rejected = [end - point.rejected for end, point in zip(ends, sft, strict=True)]
    chosen = [c[-1].chosen - p.chosen for c, p in zip(curves[strongest], sft, strict=True)]
    return Claim(
        f"with ORPO (beta={strongest:g}) rejected answers fall during training",
        max(fall) < -spread(ends),
        f"from their highest {in_words(fall)}, range over seeds {spread(ends):.3f}; "
        f"beside SFT rejected {in_words(rejected)}, chosen {in_words(chosen)}",
    )


def log_odds_grow(curves: Curves) -> Claim:
    """Figure 7: the log odds rise in the first half of the run and in the second."""
    strongest = max(curves)
    halves = []
    for curve in curves[strongest]:
        start, middle, end = (curve[at].log_odds for at in (0, len(curve) // 2, -1))
        halves += [middle - start, end - middle]
    growth = {
        beta: in_words([curve[-1].log_odds - curve[0].log_odds for curve in curves[beta]])
        for beta in (strongest, 0.0)
    }
    return Claim(
        f"log odds grow with training (beta={strongest:g})",
        min(halves) > 0,
        f"{growth[strongest]}, in the second half {in_words(halves[1::2])}; "
        f"with beta=0 {growth[0.0]}",
    )


def beta_trades(curves: Curves) -> Claim:
    """Appendix E, figure 9: a larger beta separates more; here also what that costs in NLL."""
    betas = sorted(curves)
    margins = [[curve[-1].margin for curve in curves[beta]] for beta in betas]
    nlls = [[curve[-1].nll for curve in curves[beta]] for beta in betas]
    texts, shown = [], True
    for name, columns in (("margin", margins), ("NLL", nlls)):
        means = [statistics.mean(values) for values in columns]
        shown &= all(a < b for a, b in itertools.pairwise(means))
        shown &= means[-1] - means[0] > max(spread(values) for values in columns)
        each = ", ".join(f"{mean:.3f}" for mean in means)
        texts.append(f"{name} {each} (range over seeds {max(map(spread, columns)):.3f})")
    named = ", ".join(f"{beta:g}" for beta in betas)
    return Claim("a larger beta buys margin with NLL", shown, f"beta {named}: " + "; ".join(texts))
