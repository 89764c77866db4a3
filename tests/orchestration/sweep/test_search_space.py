"""What a sweep may search, and what is said of what it may not."""

import pytest
from ray.tune.search.sample import Categorical, Float, Integer

from orpo_ray.config.schema import ConfigError, ORPOConfig
from orpo_ray.orchestration.sweep.search_space import search_space, trial_values
from orpo_ray.orchestration.sweep.trial import trial_config
from orpo_ray.runs.sweep import goal_problems


def space(**search):
    return search_space(ORPOConfig(search=search))


def test_every_form_is_a_domain_of_tune():
    found = space(
        beta="loguniform(0.05, 0.5)",
        warmup_ratio="uniform(0, 0.3)",
        seed="randint(0, 9)",
        lr_scheduler_type="choice(linear, cosine)",
        max_grad_norm=[0.5, 1.0],
        learning_rate="grid(1e-6, 1e-5)",
    )
    assert isinstance(found["beta"], Float)
    assert (found["beta"].lower, found["beta"].upper) == (0.05, 0.5)
    assert isinstance(found["warmup_ratio"], Float)
    assert isinstance(found["seed"], Integer)
    assert isinstance(found["lr_scheduler_type"], Categorical)
    assert found["lr_scheduler_type"].categories == ["linear", "cosine"]
    assert found["max_grad_norm"].categories == [0.5, 1.0]
    assert found["learning_rate"] == {"grid_search": [1e-6, 1e-5]}


def test_without_a_search_beta_and_rate_around_the_configs_own():
    """A factor of 3 down and up."""
    found = search_space(ORPOConfig(beta=0.3, learning_rate=3e-5))
    assert found.keys() == {"beta", "learning_rate"}
    assert (found["beta"].lower, found["beta"].upper) == pytest.approx((0.1, 0.9))
    rate = found["learning_rate"]
    assert (rate.lower, rate.upper) == pytest.approx((1e-5, 9e-5))


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"bta": "uniform(0, 1)"}, "search.bta: not a setting that can be searched"),
        ({"run_name": "choice(a, b)"}, "search.run_name: not a setting that can be searched"),
        ({"beta": "uniform(1, 0)"}, "search.beta: uniform takes two numbers, the smaller one"),
        ({"beta": "loguniform(0, 1)"}, "search.beta: loguniform takes numbers above 0"),
        ({"beta": "normal(0, 1)"}, "search.beta: expected loguniform"),
        ({"beta": "choice()"}, "search.beta: expected loguniform"),
        ({"beta": "uniform(-1, 1)"}, "search.beta: input should be greater than or equal to 0"),
        ({"lr_scheduler_type": "choice(linear, cos)"}, "search.lr_scheduler_type: input should"),
    ],
)
def test_what_cannot_be_searched_is_named(search, message):
    with pytest.raises(ConfigError) as caught:
        space(**search)
    (line,) = caught.value.lines
    assert line.startswith(message)


def test_a_searched_batch_size_is_not_overruled_by_the_settled_one():
    config = ORPOConfig(per_device_train_batch_size=8, global_batch_size=8)
    assert trial_config(config, {"per_device_train_batch_size": 4}).pairs_per_step == 4
    assert trial_config(config, {"beta": 0.5}).pairs_per_step == 8


def test_every_objective_has_its_own_leaves():
    found = space(
        objective="choice(orpo, simpo, sft)",
        beta="loguniform(0.05, 0.5)",
        simpo_gamma="uniform(0.5, 1.5)",
        simpo={"beta": "uniform(2, 2.5)"},
        **{"train.max_grad_norm": [1.0]},
    )
    assert found.keys() == {"objective", "beta", "simpo_gamma", "simpo.beta", "max_grad_norm"}
    drawn = {"beta": 0.2, "simpo_gamma": 0.9, "simpo.beta": 2.2, "max_grad_norm": 1.0}

    def of(objective):
        return trial_values(ORPOConfig(), {"objective": objective} | drawn)

    assert of("orpo") == {"objective": "orpo", "beta": 0.2, "max_grad_norm": 1.0}
    simpo = {"objective": "simpo", "beta": 2.2, "simpo_gamma": 0.9, "max_grad_norm": 1.0}
    assert of("simpo") == simpo
    assert of("sft") == {"objective": "sft", "max_grad_norm": 1.0}
    assert trial_values(ORPOConfig(objective="cpo"), {"beta": 0.1}) == {"beta": 0.1}
    config = trial_config(ORPOConfig(), {"objective": "simpo"} | drawn)
    assert (config.orpo.objective, config.orpo.beta) == ("simpo", 2.2)


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"dpo.beta": "uniform(0, 1)"}, "search.dpo.beta: not a setting that can be searched"),
        ({"simpo.beta": "uniform(-2, 1)"}, "search.simpo.beta: input should be greater"),
        ({"objective": "choice(orpo, dpo)"}, "search.objective: input should be"),
    ],
)
def test_what_no_objective_has_is_named(search, message):
    with pytest.raises(ConfigError) as caught:
        space(**search)
    assert caught.value.lines[0].startswith(message)


def test_a_loss_does_not_compare_objectives():
    (problem,) = goal_problems(ORPOConfig(metric="eval_x_loss"), {"objective"})
    assert problem.endswith("use eval_x_rewards/accuracies")
    assert goal_problems(ORPOConfig(metric="eval_nll_loss"), {"objective"}) == []
    assert goal_problems(ORPOConfig(metric="eval_loss"), {"beta"}) == []
