"""Settings of the Ray cluster, the run directory, and sweeps."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from orpo_ray.config.fields import Place, PositiveInt, Section, setting


def _some_workers(value: Any) -> Any:
    counts = list(value) if isinstance(value, list | tuple) and len(value) == 2 else [value]
    numbers = [count for count in counts if type(count) is int and count > 0]
    if numbers != counts or numbers != sorted(numbers):
        raise ValueError("give a number of workers from 1, or [min, max] of them")
    return value


class RaySection(Section):
    """Resources of the Ray cluster, under Ray Train's names."""

    num_workers: Annotated[int | tuple[int, int], BeforeValidator(_some_workers)] = setting(
        1,
        "Number of training workers, or [min, max] for elastic training.",
        decides="run",
    )
    use_gpu: bool | None = setting(
        None,
        "Give each worker a GPU. Default: where the cluster has GPUs.",
        decides="run",
    )
    resources_per_worker: dict[str, Annotated[float, Field(ge=0.0)]] | None = setting(
        None,
        "Ray resources of each worker. Default: one GPU, or its share of the CPUs.",
        decides="run",
    )
    accelerator_type: str | None = setting(
        None,
        "Type of GPU by its name in Ray, such as H100 or A100. Default: any.",
        decides="run",
    )
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = setting(
        "PACK",
        "How Ray places workers on nodes. The strict strategies fail where they cannot be met.",
        decides="run",
    )
    shard_size: PositiveInt | None = setting(
        None,
        "Number of workers that share one copy of the model, best those of one node. Default: all "
        "workers.",
        decides="run",
    )
    cluster_wait_s: float = setting(
        0.0,
        "Maximum time in seconds to wait for nodes that the workers need.",
        decides="run",
        ge=0.0,
        le=1e6,
    )
    max_failures: int = setting(
        3,
        "Number of times that the worker group is restarted after a failure. -1 for no limit.",
        decides="run",
        ge=-1,
    )
    health_check_timeout_s: float = setting(
        120.0,
        "Time in seconds after which a worker that does not answer is replaced.",
        decides="run",
        gt=0.0,
        le=1e6,
    )
    process_group_timeout_s: float = setting(
        600.0,
        "Timeout in seconds of the workers' collectives.",
        decides="run",
        gt=0.0,
        le=1e6,
    )

    @model_validator(mode="after")
    def _whole_copies(self) -> Self:
        if self.shard_size is None:
            return self
        if self.min_workers != self.max_workers:
            raise ValueError("shard_size: elastic training is not supported: fix num_workers")
        if self.max_workers % self.shard_size:
            raise ValueError(
                f"shard_size: num_workers={self.max_workers} is not a multiple of "
                f"{self.shard_size}: change either"
            )
        return self

    @property
    def min_workers(self) -> int:
        """Number of workers without which a run does not start."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Maximum number of workers of a run."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


class OutputSection(Section):
    """The run directory, <output_dir>/<run_name>, and trackers."""

    output_dir: Place = setting(
        "runs",
        "Parent folder of run directories: a path, s3:// or gs://.",
        decides="run",
        min_length=1,
    )
    run_name: str | None = setting(
        None,
        "Name of the run directory. Resumes the run if it exists. Default: a timestamp.",
        decides="run",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
    )
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = setting(
        (),
        "Trackers that metrics, config and reports are sent to.",
        decides="run",
    )


class TuneSection(Section):
    """What a sweep runs and how it selects the best trial; `search` has the search space."""

    num_samples: PositiveInt = setting(
        8, "Number of trials, for each point of a grid.", decides="run"
    )
    metric: str = setting(
        "eval_rewards/accuracies",
        "Metric that selects the best trial, by its name in metrics.jsonl.",
        decides="run",
        min_length=1,
    )
    metric_mode: Literal["max", "min"] | None = setting(
        None,
        "Whether the metric is maximized or minimized. Default: min if its name ends in loss, "
        "else max.",
        decides="run",
    )
    repeats: int = setting(
        1,
        "Number of runs of each set of values, with consecutive seeds from train.seed.",
        decides="run",
        ge=1,
        le=100,
    )
    search_algorithm: Literal["random", "optuna"] = setting(
        "random",
        "How values are sampled from the search space. optuna: by its TPE sampler.",
        decides="run",
    )
    trial_scheduler: Literal["asha", "median", "none"] = setting(
        "asha",
        "Scheduler that stops weak trials early, at their evaluations.",
        decides="run",
    )
    grace_steps: PositiveInt | None = setting(
        None,
        "Number of optimizer steps before a trial may be stopped. Default: up to its first "
        "evaluation.",
        decides="run",
    )
    reduction_factor: int = setting(
        3,
        "Reduction factor of ASHA: one in this many trials continues at each rung.",
        decides="run",
        ge=2,
        le=100,
    )
    max_concurrent_trials: PositiveInt | None = setting(
        None,
        "Maximum number of trials at the same time. Default: as many as the cluster has room for.",
        decides="run",
    )
    max_nll_increase: float | None = setting(
        0.1,
        "Maximum increase in nats of the best trial's NLL over the untrained model's. null for no "
        "limit.",
        decides="run",
        ge=0.0,
    )
    compare_beta_zero: bool = setting(
        True,
        "Run the best trial's settings with beta=0 as well, for comparison in the report.",
        decides="run",
    )
