"""Choosing among trials: direction, guard, and those that have nothing to choose."""

import json
import math

import pytest

from orpo_ray.config.schema import ConfigError, ORPOConfig
from orpo_ray.runs.sweep import Goal, read_trials, table_rows

ACCURACY, NLL = "eval_rewards/accuracies", "eval_nll_loss"
STOPPED = {"stopped_early": True}


def add_trial(folder, name, accuracies, nlls, finished=True, end=None, **values):
    """Write a trial's files; `end` is what its record says besides."""
    run = folder / "trials" / name
    run.mkdir(parents=True)
    record = {"trial": name, "values": {"beta": 0.1} | values} | (end or {})
    (run / "trial.json").write_text(json.dumps(record))
    lines = [
        {"step": 10 * i, ACCURACY: accuracy, NLL: nll}
        for i, (accuracy, nll) in enumerate(zip(accuracies, nlls, strict=True))
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        (run / "final").mkdir()


@pytest.fixture
def sweep(tmp_path):
    """The most accurate lost half a nat; the next was stopped; then two, and one that failed."""
    add_trial(tmp_path, "collapsed", [0.5, 0.95], [2.0, 2.5])
    add_trial(tmp_path, "stopped", [0.5, 0.9], [2.0, 1.8], finished=False, end=STOPPED)
    add_trial(tmp_path, "good", [0.5, 0.8], [2.0, 1.9])
    add_trial(tmp_path, "weaker", [0.5, 0.7], [2.0, 1.5])
    add_trial(tmp_path, "failed", [], [], finished=False, end={"failure": "step 3: not finite"})
    return read_trials(tmp_path)


def test_the_guard_rules_out_accuracy_bought_with_nll(sweep):
    goal = Goal.from_config(ORPOConfig())
    assert goal.best(sweep).name == "good"
    assert [trial.name for trial in goal.ranked(sweep)] == [
        "good",
        "weaker",
        "collapsed",
        "stopped",
        "failed",
    ]
    assert Goal.from_config(ORPOConfig(max_nll_increase=None)).best(sweep).name == "collapsed"
    assert Goal.from_config(ORPOConfig(max_nll_increase=0.6)).best(sweep).name == "collapsed"


def test_a_trial_that_was_cut_with_its_sweep_was_not_stopped_early(tmp_path):
    add_trial(tmp_path, "cut", [0.5, 0.9], [2.0, 1.8], finished=False)
    assert read_trials(tmp_path)[0].status == "unfinished"


def test_losses_are_minimised_unless_told_otherwise(sweep):
    assert Goal.from_config(ORPOConfig(metric=NLL)).best(sweep).name == "weaker"
    assert Goal.from_config(ORPOConfig(metric=NLL, metric_mode="max")).best(sweep).name == "good"


def test_a_table_row_says_what_became_of_a_trial(sweep):
    goal = Goal.from_config(ORPOConfig())
    rows = {row["trial"]: row for row in table_rows(sweep, goal)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "collapsed": "ruled out: NLL",
        "stopped": "stopped early",
        "good": "finished",
        "weaker": "finished",
        "failed": "failed",
    }
    assert rows["failed"]["failure"] == "step 3: not finite"
    assert math.isnan(rows["failed"]["nll_increase"])
    assert rows["good"]["nll_increase"] == pytest.approx(-0.1)
    assert rows["good"]["beta"] == 0.1


@pytest.mark.parametrize(
    ("metric", "prefix"),
    [(ACCURACY, "eval_"), ("eval_held_out_nll_loss", "eval_held_out_"), ("eval_loss", "eval_")],
)
def test_the_prefix_is_that_of_the_metrics_evaluation_set(metric, prefix):
    goal = Goal.from_config(ORPOConfig(metric=metric))
    assert goal.prefix == prefix


@pytest.mark.parametrize("metric", ["accuracy", "rewards/accuracies", "eval_accuracy"])
def test_a_metric_that_no_evaluation_has_is_refused(metric):
    with pytest.raises(ConfigError, match=f"tune.metric: {metric} is not an evaluation's metric"):
        Goal.from_config(ORPOConfig(metric=metric))


def test_settings_with_several_seeds_are_ranked_by_their_mean(tmp_path):
    """(0.9 + 0.5) / 2 = 0.7 < (0.8 + 0.78) / 2 = 0.79; one with a stopped run is not chosen."""
    runs = [(0.1, 0.9, True), (0.1, 0.5, True), (0.3, 0.8, True), (0.3, 0.78, True)]
    runs += [(1.0, 0.95, True), (1.0, 0.9, False)]
    for index, (beta, accuracy, finished) in enumerate(runs):
        name, seed = f"t{index}", index % 2
        add_trial(tmp_path, name, [0.5, accuracy], [2.0, 1.9], finished, beta=beta, seed=seed)
    trials = read_trials(tmp_path)
    goal = Goal.from_config(ORPOConfig(repeats=2))
    best = goal.best(trials)
    assert best.name == "t2"
    assert goal.mean(best, trials) == pytest.approx(0.79)
    assert goal.spread(best, trials) == pytest.approx(0.01)
    row = next(row for row in table_rows(trials, goal) if row["trial"] == "t3")
    assert (row["mean"], row["spread"]) == pytest.approx((0.79, 0.01))
    assert [trial.name for trial in goal.ranked(trials)][:4] == ["t2", "t3", "t0", "t1"]
