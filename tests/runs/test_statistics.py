"""Figures of scored pairs and how sure they are."""

import numpy as np
import pytest

from orpo_ray.runs import statistics
from orpo_ray.runs.statistics import N_DRAWN, Scores, differences, estimates


def scores(
    chosen: list[float], rejected: list[float], lengths: list[tuple[int, int]], prompts: list[int]
) -> Scores:
    w, v = np.array(chosen), np.array(rejected)
    odds = (w - np.log(-np.expm1(w))) - (v - np.log(-np.expm1(v)))
    chosen_tokens, rejected_tokens = np.array(lengths, float).T
    return Scores(np.array(prompts), w, v, odds, chosen_tokens, rejected_tokens)


def test_figures_of_four_pairs() -> None:
    """Right, right, wrong, right.

    The chosen answer is the longer one in the first two and the shorter one in the last two, so the
    two accuracies are 1 and 1/2.
    """
    found = estimates(
        scores([-1, -2, -2, -1], [-2, -3, -1, -2], [(3, 2), (4, 1), (1, 2), (2, 5)], [0, 1, 2, 3])
    )
    values = {name: estimate.value for name, estimate in found.items()}
    assert values["accuracy"] == 0.75
    assert values["length_controlled_accuracy"] == 0.75
    assert values["margin"] == pytest.approx((1 + 1 - 1 + 1) / 4)
    assert values["nll"] == pytest.approx((3 + 8 + 2 + 2) / 10)
    assert values["perplexity"] == pytest.approx(np.exp(1.5))
    assert (values["logps_chosen"], values["logps_rejected"]) == (-1.5, -2.0)
    odds = [p / (1 - p) for p in (np.exp(-1.0), np.exp(-2.0), np.exp(-3.0))]
    log_odds = [
        np.log(odds[0] / odds[1]),
        np.log(odds[1] / odds[2]),
        np.log(odds[1] / odds[0]),
        np.log(odds[0] / odds[1]),
    ]
    assert values["log_odds"] == pytest.approx(np.mean(log_odds))
    assert values["odds_ratio_loss"] == pytest.approx(
        np.mean(np.log1p(np.exp(-np.array(log_odds))))
    )


def test_lengths_do_not_buy_length_controlled_accuracy() -> None:
    """A model that likes the longer answer: right in 9 of 10 pairs, and in half of each kind."""
    found = estimates(
        scores([-1.0] * 9 + [-2.0], [-2.0] * 9 + [-1.0], [(5, 2)] * 9 + [(2, 5)], list(range(10)))
    )
    assert found["accuracy"].value == 0.9
    assert found["length_controlled_accuracy"].value == 0.5


def simulated(rng: np.random.Generator, n_prompts: int, shift: float) -> Scores:
    """One to three pairs a prompt, in turn, whose margins share the prompt's part of the noise."""
    prompts = np.repeat(np.arange(n_prompts), np.arange(n_prompts) % 3 + 1)
    margin = shift + rng.normal(size=n_prompts)[prompts] + 0.5 * rng.normal(size=len(prompts))
    rejected = -3.0 + 0.1 * rng.normal(size=len(prompts))
    chosen = np.minimum(rejected + margin, -1e-3)
    tokens = np.full(len(prompts), 8.0)
    return scores(chosen.tolist(), rejected.tolist(), [(8, 8)] * len(tokens), prompts.tolist())


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """300 samples of 80 prompts: 95 % intervals should hold it in 285 of them.

    The spread of that count is sqrt(300 x 0.95 x 0.05) = 3.8, and the percentile bootstrap is known
    to be a little short. Intervals that take pairs of one prompt for independent ones are seen to
    be too narrow.
    """
    rng = np.random.default_rng(1)
    everyone = simulated(rng, 200_000, 0.4)
    truth = np.average(everyone.chosen > everyone.rejected)
    held = alone = 0
    for _ in range(300):
        sample = simulated(rng, 80, 0.4)
        accuracy = estimates(sample)["accuracy"]
        held += accuracy.low <= truth <= accuracy.high
        pairs = Scores(**vars(sample) | {"prompts": np.arange(len(sample.prompts))})
        accuracy = estimates(pairs)["accuracy"]
        alone += accuracy.low <= truth <= accuracy.high
    assert 273 <= held <= 296
    assert alone < held - 10


def test_a_model_does_not_differ_from_itself() -> None:
    sample = simulated(np.random.default_rng(2), 50, 0.2)
    for found in differences(sample, sample).values():
        assert (found.value, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_length_controlled_accuracy_and_log_probabilities_are_compared_pair_by_pair() -> None:
    """Nine pairs with a longer chosen answer, one with a shorter one; two answers change sides.

    The model is right in one more long pair and in the short one: (1/9 + 1/1) / 2. Its chosen
    answers gain a nat a token in each of those, of ten pairs.
    """
    lengths = [(5, 2)] * 9 + [(2, 5)]
    base = scores([-1.0] * 8 + [-2.5, -2.5], [-2.0] * 10, lengths, list(range(10)))
    better = scores([-1.0] * 8 + [-1.5, -1.5], [-2.0] * 10, lengths, list(range(10)))
    found = differences(better, base)
    assert found["accuracy"].value == pytest.approx(0.2)
    controlled = found["length_controlled_accuracy"]
    assert controlled.value == pytest.approx((1 / 9 + 1) / 2)
    assert controlled.low <= controlled.value <= controlled.high
    # Signs of two prompts: both the same way in half of all draws.
    assert controlled.p_value == pytest.approx(0.5, abs=0.05)
    assert found["logps_chosen"].value == pytest.approx(0.2)
    assert found["logps_rejected"].value == 0.0
    assert found["logps_rejected"].p_value == 1.0


def test_without_pairs_of_one_kind_length_controlled_accuracy_is_not_compared() -> None:
    sample = scores([-1.0, -2.0], [-2.0, -1.0], [(5, 2), (4, 3)], [0, 1])
    assert "length_controlled_accuracy" not in differences(sample, sample)
    assert "logps_chosen" in differences(sample, sample)


@pytest.mark.slow
@pytest.mark.parametrize(("n_prompts", "gain"), [(60, 0.8), (200, 0.5)], ids=["apart", "clusters"])
def test_the_paired_test_is_right_about_chance_and_about_a_difference(
    n_prompts: int, gain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a difference p-values below 0.05 come in 5 of 100 samples, give or take 2.2."""
    monkeypatch.setattr(statistics, "N_DRAWN", 60)
    rng = np.random.default_rng(3)
    by_chance, found = 0, 0
    for _ in range(100):
        one, other = simulated(rng, n_prompts, 0.3), simulated(rng, n_prompts, 0.3)
        by_chance += differences(one, other)["margin"].p_value < 0.05
        better = Scores(**vars(other) | {"chosen": np.minimum(other.chosen + gain, -1e-3)})
        found += differences(better, one)["margin"].p_value < 0.05
    assert by_chance <= 12
    assert found >= 90


def test_scores_of_other_pairs_are_refused() -> None:
    rng = np.random.default_rng(4)
    with pytest.raises(ValueError, match="not of the same pairs"):
        differences(simulated(rng, 20, 0.0), simulated(rng, 21, 0.0))


def test_few_prompts_are_drawn_one_by_one_and_many_in_clusters() -> None:
    """Each prompt is in one cluster, so that the sums over all are the same."""
    sums = np.random.default_rng(5).normal(size=(N_DRAWN + 7, 2))
    assert np.array_equal(statistics._clustered(sums[:N_DRAWN], 0), sums[:N_DRAWN])
    clustered = statistics._clustered(sums, 0)
    assert len(clustered) == N_DRAWN
    assert clustered.sum(axis=0) == pytest.approx(sums.sum(axis=0))


@pytest.mark.long
def test_intervals_of_clusters_are_as_wide_as_those_of_prompts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """20,000 prompts of one to three pairs: the width of 1,000 resamples is known to about 4 %.

    The spread of an end of a 95 % interval of N resamples of a normal statistic is
    sqrt(0.025 x 0.975 / N) / density(1.96) = 0.085 of its spread, which is 3 % of the width of
    3.92 for both ends. With fewer clusters than prompts another 1 / sqrt(2 x 2,000) = 1.6 % comes.
    """
    sample = simulated(np.random.default_rng(6), 20_000, 0.4)
    monkeypatch.setattr(statistics, "N_DRAWN", 20_000)
    exact = estimates(sample)
    monkeypatch.setattr(statistics, "N_DRAWN", 2000)
    found = estimates(sample)
    for name, estimate in exact.items():
        assert found[name].value == pytest.approx(estimate.value, abs=1e-12, nan_ok=True)
        width = found[name].high - found[name].low
        assert width == pytest.approx(estimate.high - estimate.low, rel=0.16, nan_ok=True), name


@pytest.mark.slow
def test_intervals_of_clusters_hold_the_truth_as_often_as_they_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """300 samples of 900 prompts in 300 clusters; see the test of prompts drawn one by one."""
    monkeypatch.setattr(statistics, "N_DRAWN", 300)
    rng = np.random.default_rng(7)
    everyone = simulated(rng, 200_000, 0.4)
    truth = np.average(everyone.chosen > everyone.rejected)
    held = 0
    for _ in range(300):
        accuracy = estimates(simulated(rng, 900, 0.4))["accuracy"]
        held += accuracy.low <= truth <= accuracy.high
    assert 273 <= held <= 296
