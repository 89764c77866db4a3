"""Schedulers of a sweep: weak trials are stopped, but none at its own last step."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.orchestration.sweep.strategies import early_stopping

METRIC = "eval_rewards/accuracies"
STEPS_PER_EPOCH = 20
ALONE = SimpleNamespace(get_live_trials=list)  # all that the median rule asks Ray Tune's loop


def decisions(scheduler: Any, values: dict[str, Any], results: dict[int, float]) -> list[str]:
    """What a scheduler says to the results of a trial, accuracies by step."""
    trial = Trial("orpo", config=values, stub=True)
    scheduler.on_trial_add(ALONE, trial)
    found, last = [], {}
    for step, accuracy in results.items():
        last = {"step": step, "epoch": step / STEPS_PER_EPOCH, METRIC: accuracy}
        found.append(scheduler.on_trial_result(ALONE, trial, last))
        if found[-1] == TrialScheduler.STOP:
            return found
    # Ray Train's last report, of the exported model, comes with the same step.
    found.append(scheduler.on_trial_result(ALONE, trial, last))
    scheduler.on_trial_complete(ALONE, trial, last)
    return found


@pytest.mark.parametrize("name", ["asha", "median"])
def test_a_weak_trial_is_stopped_before_its_last_step_and_never_at_it(name):
    """Two epochs are 40 steps; ASHA looks at steps 10 and 40, the median rule at both, too."""
    config = ORPOConfig(trial_scheduler=name, num_train_epochs=2, reduction_factor=4)
    scheduler = early_stopping(config, n_steps=40, grace_steps=10)
    scheduler.set_search_properties(METRIC, "max")
    for _ in range(4):
        assert set(decisions(scheduler, {}, {10: 0.8, 40: 0.9})) == {TrialScheduler.CONTINUE}
    assert decisions(scheduler, {}, {10: 0.6, 40: 0.9})[-1] == TrialScheduler.STOP
    late = decisions(scheduler, {}, {10: 0.8, 40: 0.1})
    assert late == [TrialScheduler.CONTINUE] * 3


def test_the_last_step_is_that_of_the_trials_own_settings():
    """A searched number of steps: 10 is the last of one trial and the first rung of the other."""
    config = ORPOConfig(trial_scheduler="asha", max_steps=40, reduction_factor=4)
    scheduler = early_stopping(config, n_steps=40, grace_steps=10)
    scheduler.set_search_properties(METRIC, "max")
    for _ in range(4):
        decisions(scheduler, {}, {10: 0.8, 40: 0.9})
    assert decisions(scheduler, {"max_steps": 10}, {10: 0.6})[-1] == TrialScheduler.CONTINUE
    assert decisions(scheduler, {"max_steps": 12}, {10: 0.6}) == [TrialScheduler.STOP]
