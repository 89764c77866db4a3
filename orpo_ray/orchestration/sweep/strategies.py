"""What draws the values of trials, how many run at a time, and what stops them; on the driver."""

from typing import Any

import ray
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from orpo_ray.config.schema import ConfigError, ORPOConfig
from orpo_ray.orchestration.start import Start
from orpo_ray.orchestration.sweep.trial import trial_config
from orpo_ray.runs.status import total_steps


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


class _SparesLastStep:
    """Mixin of a scheduler: a trial at its last step only has its model to write.

    Args:
        config: of the sweep; a searched batch size decides how many steps a trial has.
        more: arguments of the scheduler.
    """

    def __init__(self, config: ORPOConfig, **more: Any) -> None:
        super().__init__(**more)
        self._config = config

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Called by Ray Tune with every report of a trial."""
        n_steps = total_steps(trial_config(self._config, trial.config), [result])
        if n_steps is not None and result["step"] >= n_steps:
            return str(TrialScheduler.CONTINUE)
        decision: str = super().on_trial_result(controller, trial, result)  # type: ignore[misc]
        return decision


class _Asha(_SparesLastStep, ASHAScheduler):  # type: ignore[misc]  # Ray is not typed
    pass


class _Median(_SparesLastStep, MedianStoppingRule):  # type: ignore[misc]
    pass


def trial_scheduler(start: Start) -> TrialScheduler:
    """What stops the trials of a sweep early; see `early_stopping`."""
    config = start.config
    every = config.with_intervals(start.steps_per_epoch).train.eval_steps
    return early_stopping(config, start.n_steps, config.tune.grace_steps or int(every or 1))


def early_stopping(config: ORPOConfig, n_steps: int, grace_steps: int) -> TrialScheduler:
    """What stops trials early, counted in steps: from `grace_steps` on, but not at the last one."""
    if config.tune.trial_scheduler == "asha":
        return _Asha(
            config,
            time_attr="step",
            max_t=max(n_steps, grace_steps),
            grace_period=grace_steps,
            reduction_factor=config.tune.reduction_factor,
            stop_last_trials=False,  # after its last evaluation a trial still writes its model
        )
    if config.tune.trial_scheduler == "median":
        return _Median(config, time_attr="step", grace_period=grace_steps, min_samples_required=2)
    return FIFOScheduler()
