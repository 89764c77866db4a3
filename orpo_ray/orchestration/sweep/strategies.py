"""What draws the values of trials, how many run at a time, and what stops them; on the driver."""

from typing import Any

import ray
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from orpo_ray.config.schema import ConfigError, ORPOConfig
from orpo_ray.orchestration.start import Start


def concurrent_trials(config: ORPOConfig) -> int:
    """As many trials as the cluster holds whole, so that no two wait for each other's half."""
    total = ray.cluster_resources()
    wanted = config.ray.resources_per_worker or {}
    fits = [
        int(total.get(name, 0) // (amount * config.ray.max_workers))
        for name, amount in wanted.items()
        if amount
    ]
    return max(1, min([*fits, config.tune.max_concurrent_trials or 1 << 30]))


def search_algorithm(config: ORPOConfig, n_before: int) -> Any:
    """What draws values; samples that were asked for later are drawn with a seed of their own."""
    seed = (config.train.seed + n_before) % 2**32
    from ray.tune.search.basic_variant import BasicVariantGenerator

    if config.tune.search_algorithm == "random":
        return BasicVariantGenerator(
            random_state=seed,
            max_concurrent=concurrent_trials(config),
            constant_grid_search=True,  # the runs of one setting draw their values once
        )
    if any(isinstance(v, str) and v.strip().startswith("grid(") for v in config.search.values()):
        raise ConfigError(["tune.search_algorithm: optuna draws values; a grid is for random"])
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return OptunaSearch(seed=seed)


def trial_scheduler(start: Start) -> TrialScheduler:
    """What stops trials early, counted in steps: nothing before the first evaluation."""
    config = start.config
    every = config.with_intervals(start.steps_per_epoch).train.eval_steps
    grace = config.tune.grace_steps or int(every or 1)
    if config.tune.trial_scheduler == "asha":
        n_steps = max(start.n_steps, grace)
        return ASHAScheduler(
            time_attr="step",
            max_t=n_steps,
            grace_period=grace,
            reduction_factor=config.tune.reduction_factor,
            stop_last_trials=False,  # after its last evaluation a trial still writes its model
        )
    if config.tune.trial_scheduler == "median":
        return MedianStoppingRule(time_attr="step", grace_period=grace, min_samples_required=2)
    return FIFOScheduler()
