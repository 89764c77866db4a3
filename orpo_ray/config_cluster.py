"""Where runs go and how many there are: settings of workers, run directories and sweeps."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from orpo_ray.config_sections import Place, PositiveInt, Section


def _some_workers(value: Any) -> Any:
    counts = list(value) if isinstance(value, list | tuple) and len(value) == 2 else [value]
    numbers = [count for count in counts if type(count) is int and count > 0]
    if numbers != counts or numbers != sorted(numbers):
        raise ValueError("give a number of workers from 1, or [least, most] of them")
    return value


class RaySection(Section):
    """What is asked of the Ray cluster, in Ray Train's own words."""

    num_workers: Annotated[int | tuple[int, int], BeforeValidator(_some_workers)] = Field(
        1, description="Training processes; [least, most]: as many as the cluster has room for."
    )
    use_gpu: bool | None = Field(None, description="A GPU each; unset: if the cluster has any.")
    resources_per_worker: dict[str, Annotated[float, Field(ge=0.0)]] | None = Field(
        None, description="Ray resources a worker; unset: its GPU, or its share of the CPUs."
    )
    accelerator_type: str | None = Field(
        None, description="Kind of GPU, as Ray names it: H100, A100, ...; unset: any."
    )
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        "PACK", description="Of the workers over the nodes; strict: or not at all."
    )
    shard_size: PositiveInt | None = Field(
        None, description="Workers that share one copy of the model, best a node's; unset: all."
    )
    cluster_wait_s: float = Field(
        0.0, ge=0.0, le=1e6, description="Longest wait for nodes that the workers need."
    )
    max_failures: int = Field(3, ge=-1, description="Worker group restarts; -1: no limit.")
    health_check_timeout_s: float = Field(
        120.0, gt=0.0, le=1e6, description="A worker that does not answer for so long is replaced."
    )
    process_group_timeout_s: float = Field(
        600.0, gt=0.0, le=1e6, description="Longest wait of a worker for the others."
    )

    @model_validator(mode="after")
    def _whole_copies(self) -> Self:
        if self.shard_size is None:
            return self
        if self.min_workers != self.max_workers:
            raise ValueError("shard_size: for a fixed num_workers only")
        if self.max_workers % self.shard_size:
            raise ValueError(
                f"shard_size: {self.max_workers} workers are no multiple of {self.shard_size}"
            )
        return self

    @property
    def min_workers(self) -> int:
        """Workers without which a run does not start."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Workers that a run has at most."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


class OutputSection(Section):
    """Where the run directory goes: <output_dir>/<run_name>."""

    output_dir: Place = Field(
        "runs", min_length=1, description="Parent of run directories: a path, s3:// or gs://."
    )
    run_name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
        description="Folder of the run; an existing one goes on; unset: a new one by the time.",
    )
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = Field(
        (), description="Trackers that metrics, config and reports go to as well."
    )


class TuneSection(Section):
    """What a sweep tries and how it chooses; `search.<setting>` says what is searched."""

    num_samples: PositiveInt = Field(8, description="Trials (for each point of a grid).")
    metric: str = Field(
        "eval_rewards/accuracies", min_length=1, description="What the best trial is best at."
    )
    metric_mode: Literal["max", "min"] | None = Field(
        None, description="unset: min for losses, else max."
    )
    repeats: int = Field(
        1, ge=1, le=100, description="Runs of each setting, with seeds that follow train.seed."
    )
    search_algorithm: Literal["random", "optuna"] = Field(
        "random", description="How values are drawn; optuna: TPE."
    )
    trial_scheduler: Literal["asha", "median", "none"] = Field(
        "asha", description="What stops weak trials early, at evaluations."
    )
    grace_steps: PositiveInt | None = Field(
        None, description="Steps that every trial gets; unset: to its first evaluation."
    )
    reduction_factor: int = Field(3, ge=2, le=100, description="ASHA goes on with 1 of so many.")
    max_concurrent_trials: PositiveInt | None = Field(
        None, description="Trials at a time; unset: as many as the cluster holds."
    )
    max_nll_increase: float | None = Field(
        0.1, ge=0.0, description="Nats of NLL a best trial may lose against the start; null: any."
    )
    compare_beta_zero: bool = Field(
        True, description="Run the best trial's settings with beta=0 too, for the report."
    )
