"""Starting or joining Ray, and asking it for workers; on the driver."""

import importlib
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import ray
from ray.train import (
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    UserCallback,
)
from ray.util import placement_group_table

from orpo_ray.config.schema import ConfigError, ORPOConfig
from orpo_ray.orchestration.cluster.address import LOCAL, cluster_address
from orpo_ray.orchestration.cluster.loopback import (
    interface_settings,
    keep_to_this_machine,
    keep_token_private,
)
from orpo_ray.orchestration.stopping import interrupted_by, kept_handlers
from orpo_ray.pretrained import UnsupportedModelError
from orpo_ray.storage.files import one_line
from orpo_ray.storage.folder import Folder
from orpo_ray.training.allocator import memory_settings

_KIND = "accelerator_type:"
_connected: list[object] = []  # the contexts of what `connect` joined or started
_LOOK_S, _SAY_S = 1.0, 60.0
# Read by Ray where `fit` is called and passed on. The poll sets how fast a report is taken up.
_RAY_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_USAGE_STATS_ENABLED": "0",  # unless asked for
    "RAY_task_oom_retries": "3",  # else without end: a file may hold rows that no node has room for
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's other output is silent when it is told to be
}
# Fills the Train page of a cluster's dashboard: runs by name, attempts, workers, logs. The config
# is shown there; no setting of it is a secret. An actor of 0.4 GB on the head node keeps all that.
_TRAIN_PAGE = ("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
# Ray copies a job's working directory here on every node, and deletes the copies.
_JOB_COPIES = "working_dir_files"
# With torch and transformers.
_MODELS = ("orpo_ray.orchestration.cluster.process_group", "orpo_ray.models.packing_check")
_log = logging.getLogger(__name__)


def connect(dashboard: bool = False) -> None:
    """Join the cluster that RAY_ADDRESS names, or start Ray on this machine; quietly.

    Args:
        dashboard: start it with a Ray of this machine. A sweep needs it: what frees the workers
            of a trial that is stopped asks it which they are.

    Raises:
        ConfigError: when no cluster answers there, and when Ray cannot be started.
    """
    for name, value in _RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    for logger in ("ray", "ray.data"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    # Of a trial that fails, or is stopped with its sweep, the sweep tells by itself.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    if not ray.is_initialized():
        with kept_handlers(), _no_hangup(), _importing():
            _join(dashboard)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def _join(dashboard: bool) -> None:
    """Join a cluster or start Ray; see `connect`."""
    address = cluster_address()
    is_local = address == LOCAL
    local = {"include_dashboard": dashboard} if is_local else {}
    if is_local:
        keep_to_this_machine()
        keep_token_private()
    try:
        context = ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except SystemExit as end:  # by the handler of SIGTERM that Ray installs
        raise interrupted_by(signal.SIGTERM) from end
    except Exception as error:  # a plain one of Ray's is a node that does not start in time
        what = "started on this machine" if is_local else f"joined at {address}"
        hint = "; set RAY_TMPDIR to a short path that can be written" if is_local else ""
        raise ConfigError([f"Ray cannot be {what}: {one_line(error)}{hint}"]) from error
    _connected.append(context)
    if not is_local and context.dashboard_url:
        os.environ.setdefault(*_TRAIN_PAGE)


@contextmanager
def _importing() -> Iterator[None]:
    """Import meanwhile what comes next, which takes as long as Ray takes to start."""
    thread = threading.Thread(target=_import_models, daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _import_models() -> None:
    with suppress(Exception):  # whoever needs them meets it again
        for name in _MODELS:
            importlib.import_module(name)


@contextmanager
def _no_hangup() -> Iterator[None]:
    """Block SIGHUP for what is started inside: of a terminal that is closed only the driver learns.

    A Ray of this machine would end on it at once, and a run could not save a checkpoint.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def disconnect() -> None:
    """Leave the cluster, or end the Ray of this machine, if `connect` joined or started it."""
    if _connected:
        _connected.clear()
        ray.shutdown()


def output_warning(run: Folder) -> str | None:
    """A line for a run directory that Ray deletes and that other nodes do not have, else None."""
    if run.url is not None or _JOB_COPIES not in run.path.parts:
        return None
    return (
        f"output_dir: {run.parent} is in the copy that Ray made of the job's working directory: it "
        "is deleted, and other nodes do not have it; give a path that all nodes share, or a URL"
    )


def with_cluster(config: ORPOConfig) -> ORPOConfig:
    """Settle what was left to the cluster: GPUs or not, and each worker's resources.

    Waits up to `cluster_wait_s` for nodes that are still to come.

    Raises:
        ConfigError: when the cluster cannot hold the workers, with what is asked and what is there;
            and for settings that need GPUs where workers have none.
    """
    asked = config.ray.resources_per_worker
    if asked is not None and not any(asked.values()):
        shown = ", ".join(f"{name}: {amount:g}" for name, amount in asked.items())
        raise ConfigError(
            [
                f"resources_per_worker: Ray starts no worker that asks for nothing (got "
                f"{{{shown}}}); give a share, such as {{CPU: 0.1}}"
            ]
        )
    deadline = time.monotonic() + config.ray.cluster_wait_s
    while True:
        total = ray.cluster_resources()
        use_gpu = config.ray.use_gpu
        if use_gpu is None:
            use_gpu = total.get("GPU", 0) >= config.ray.min_workers
        resources = config.ray.resources_per_worker or _fair_share(config.ray.max_workers, use_gpu)
        settled = config.replace(use_gpu=use_gpu, resources_per_worker=resources)
        n_fit = workers_that_fit(settled)
        if n_fit >= config.ray.min_workers:
            _refuse_without_gpus(settled)
            return settled
        if time.monotonic() >= deadline:
            raise ConfigError([_what_is_missing(settled, n_fit)])
        time.sleep(min(_LOOK_S, max(0.0, deadline - time.monotonic())))


def _refuse_without_gpus(config: ORPOConfig) -> None:
    """Refuse what needs GPUs where no worker of a settled config has one."""
    if config.ray.use_gpu or not (config.model.load_in_4bit or config.model.use_liger_kernel):
        return
    import torch

    from orpo_ray.models.fused.liger import refuse_off_gpus
    from orpo_ray.models.quantized import refuse_quantization

    try:
        if config.model.load_in_4bit:
            refuse_quantization(torch.device("cpu"))
        refuse_off_gpus(torch.device("cpu"))
    except UnsupportedModelError as error:
        raise ConfigError([str(error)]) from error


def workers_that_fit(config: ORPOConfig) -> int:
    """How many workers of a settled config the nodes hold at most, each worker whole on a node."""
    wanted = dict(config.ray.resources_per_worker or {})
    if config.ray.accelerator_type:
        wanted[_KIND + config.ray.accelerator_type] = 0.001
    wanted = {name: amount for name, amount in wanted.items() if amount}
    each = [
        # A share such as a third, added up, may be a little more than the whole.
        min((int(node.get(n, 0) / amount + 1e-6) for n, amount in wanted.items()), default=1 << 30)
        for node in _nodes()
    ]
    match config.ray.placement_strategy:
        case "STRICT_PACK":
            return max(each, default=0)
        case "STRICT_SPREAD":
            return sum(n > 0 for n in each)
        case _:
            return sum(each)


def _what_is_missing(config: ORPOConfig, n_fit: int) -> str:
    ask, wanted = config.ray, dict(config.ray.resources_per_worker or {})
    need = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items())
    if ask.accelerator_type:
        need += f" of kind {ask.accelerator_type}"
    kinds = ("CPU", "GPU", *wanted)
    nodes = "; ".join(
        ", ".join(
            f"{amount:g} {name}"
            for name, amount in node.items()
            if name in kinds or name.startswith(_KIND)
        )
        for node in _nodes()
    )
    strategy = "" if ask.placement_strategy == "PACK" else f" ({ask.placement_strategy})"
    waited = f" after {ask.cluster_wait_s:g} s" if ask.cluster_wait_s else ""
    return (
        f"num_workers: {ask.min_workers} workers{strategy} need {need} each, the cluster holds "
        f"{n_fit}{waited}; its nodes have: {nodes}; ask for fewer workers or resources_per_worker"
    )


def _nodes() -> list[dict[str, float]]:
    """The resources of every node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _fair_share(num_workers: int, use_gpu: bool) -> dict[str, float]:
    """A GPU and a CPU each, or without GPUs an equal share of the largest node's CPUs."""
    if use_gpu:
        return {"CPU": 1.0, "GPU": 1.0}
    return {"CPU": cpu_share(num_workers, [node.get("CPU", 0.0) for node in _nodes()])}


def cpu_share(num_workers: int, cpus: Sequence[float]) -> float:
    """The largest share of the largest node's CPUs of which the nodes hold all workers.

    Args:
        num_workers: how many workers there are.
        cpus: of every node; a head node often has none.
    """
    most = max(cpus)
    for per_node in range(1, num_workers + 1):
        share = most / per_node
        share = float(math.floor(share)) if share >= 1 else share
        # A share such as a third, added up, may be a little more than the whole.
        if share and sum(int(n / share + 1e-6) for n in cpus) >= num_workers:
            return share
    return 1.0  # no node has any: what is missing is said


@contextmanager
def reporting_waits(config: ORPOConfig) -> Iterator[None]:
    """While it lasts, log once a minute what workers of a settled config wait for, if they do."""
    ended = threading.Event()

    def report() -> None:
        while not ended.wait(_SAY_S):
            text = waiting_text(config)
            if text:
                _log.warning(text)

    thread = threading.Thread(target=report, name="orpo-waits", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()


def waiting_text(config: ORPOConfig) -> str | None:
    """What workers of a settled config wait for; None where none do."""
    wanted = {n: amount for n, amount in (config.ray.resources_per_worker or {}).items() if amount}
    waiting = [
        bundle
        for group in placement_group_table().values()
        if group["state"] in ("PENDING", "RESCHEDULING")
        for bundle in group["bundles"].values()
        if wanted.items() <= bundle.items()
    ]
    if not waiting:
        return None
    total, free = ray.cluster_resources(), ray.available_resources()
    need = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items())
    left = ", ".join(f"{free.get(n, 0):g} of {total.get(n, 0):g} {n}" for n in wanted)
    return (
        f"waiting for resources: {len(waiting)} workers need {need} each, and {left} are free; "
        "other programs hold the rest, or a node is gone"
    )


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
        accelerator_type=config.ray.accelerator_type,
        placement_strategy=config.ray.placement_strategy,
    )


def run_settings(config: ORPOConfig, run: Folder, callbacks: list[UserCallback]) -> RunConfig:
    """Where Ray Train keeps its state of the run, and what it does about failures."""
    return RunConfig(
        name=run.name,
        storage_path=run.parent.address,
        failure_config=FailureConfig(
            max_failures=config.ray.max_failures, controller_failure_limit=10
        ),
        logging_config=LoggingConfig(log_level="ERROR"),
        callbacks=callbacks,
        worker_runtime_env={
            "env_vars": {**memory_settings(bool(config.ray.use_gpu)), **interface_settings()}
        },
    )
