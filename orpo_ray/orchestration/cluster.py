"""Starting or joining Ray, and asking it for workers; on the driver."""

import json
import logging
import math
import os
from pathlib import Path

import ray
from ray.train import (
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    UserCallback,
)
from transformers.utils.logging import disable_progress_bar

from orpo_ray.config import ConfigError, ORPOConfig

_SNAPSHOT = "checkpoint_manager_snapshot.json"
# Read by Ray where `fit` is called and passed on. The poll sets how fast a report is taken up.
_RAY_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's other output is silent when it is told to be
}
# Fills the Train page of a cluster's dashboard: runs by name, attempts, workers, logs. The config
# is shown there; no setting of it is a secret. An actor of 0.4 GB on the head node keeps all that.
_TRAIN_PAGE = ("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
# A step on the host frees and asks again for the same large tensors: glibc, which by default gives
# them back to the system each time, made 2.3 million page faults in 40 steps of a 5 M model, and
# the step a tenth slower (benchmarks/RESULTS.md).
HOST_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(10**9),
    "MALLOC_TOP_PAD_": str(10**8),
    "MALLOC_TRIM_THRESHOLD_": str(2 * 10**9),
}


def connect(dashboard: bool = False) -> None:
    """Join the cluster that RAY_ADDRESS names, or start Ray on this machine; quietly.

    Args:
        dashboard: start it with a Ray of this machine. A sweep needs it: what frees the workers
            of a trial that is stopped asks it which they are.
    """
    for name, value in _RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    disable_progress_bar()
    for logger in ("ray", "ray.data"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    if ray.is_initialized():
        return
    local = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": dashboard}
    context = ray.init(log_to_driver=False, logging_level=logging.ERROR, **local)
    if not local and context.dashboard_url:
        os.environ.setdefault(*_TRAIN_PAGE)


def with_cluster(config: ORPOConfig) -> ORPOConfig:
    """Settle what was left to the cluster: GPUs or not, and each worker's resources.

    Raises:
        ConfigError: when the cluster cannot hold the workers, naming what is missing.
    """
    total = ray.cluster_resources()
    use_gpu = config.ray.use_gpu
    if use_gpu is None:
        use_gpu = total.get("GPU", 0) >= config.ray.min_workers
    resources = config.ray.resources_per_worker or _fair_share(config.ray.max_workers, use_gpu)
    settled = config.replace(use_gpu=use_gpu, resources_per_worker=resources)
    wanted = {name: amount * config.ray.min_workers for name, amount in resources.items()}
    missing = [
        f"num_workers: {config.ray.min_workers} workers need {amount:g} {name}, "
        f"the cluster has {total.get(name, 0):g}; ask for fewer workers or resources_per_worker"
        for name, amount in wanted.items()
        if amount > total.get(name, 0)
    ]
    if missing:
        raise ConfigError(missing)
    return settled


def _fair_share(num_workers: int, use_gpu: bool) -> dict[str, float]:
    """A GPU and a CPU each, or without GPUs an equal share of the largest node's CPUs."""
    if use_gpu:
        return {"CPU": 1.0, "GPU": 1.0}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    per_node = math.ceil(num_workers / len(nodes))
    share = max(node.get("CPU", 0.0) for node in nodes) / per_node
    return {"CPU": float(math.floor(share)) if share >= 1 else share}


def ask_for_timeouts(config: ORPOConfig) -> None:
    """Set what Ray Train reads from the environment where a run starts."""
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(config.ray.health_check_timeout_s)
    # With fewer workers than asked for, a longer wait would only be for those that are gone.
    is_elastic = config.ray.min_workers < config.ray.max_workers
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "30" if is_elastic else "60"


def scaling(config: ORPOConfig) -> ScalingConfig:
    """The workers of a settled config."""
    return ScalingConfig(
        num_workers=config.ray.num_workers,
        use_gpu=bool(config.ray.use_gpu),
        resources_per_worker=config.ray.resources_per_worker,
    )


def run_settings(
    config: ORPOConfig, run_directory: Path, callbacks: list[UserCallback]
) -> RunConfig:
    """Where Ray Train keeps its state of the run, and what it does about failures."""
    return RunConfig(
        name=run_directory.name,
        storage_path=str(run_directory.parent),
        failure_config=FailureConfig(
            max_failures=config.ray.max_failures, controller_failure_limit=10
        ),
        logging_config=LoggingConfig(log_level="ERROR"),
        callbacks=callbacks,
        worker_runtime_env=None if config.ray.use_gpu else {"env_vars": HOST_MEMORY},
    )


def set_aside_broken_snapshot(run_directory: Path) -> str | None:
    """Move Ray Train's own state away when it cannot be started from; the checkpoints stay.

    Ray writes the file in place and refuses to start on a torn one, or on one that names a
    checkpoint which is gone, as earlier versions of this project let it. Training finds its
    checkpoints by their manifests, not by it.

    Returns:
        What was wrong, or None.
    """
    path = run_directory / _SNAPSHOT
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        named = [entry["checkpoint_dir_name"] for entry in content["checkpoint_results"]]
    except (ValueError, KeyError, TypeError):
        problem = "it is torn"
    else:
        gone = [name for name in named if not (run_directory / name).is_dir()]
        if not gone:
            return None
        problem = f"{gone[0]} is gone"
    path.replace(path.with_suffix(".set_aside.json"))
    return f"Ray Train's {_SNAPSHOT} was set aside: {problem}"
