"""What a report of a fault needs to say of a machine, a cluster and a config; on the driver."""

import importlib.metadata
import json
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch

from orpo_ray.config.schema import ConfigError, ORPOConfig
from orpo_ray.dataset.ingest import first_refused
from orpo_ray.orchestration.cluster import connection
from orpo_ray.orchestration.inputs import find_inputs
from orpo_ray.orchestration.preflight import check_model
from orpo_ray.orchestration.start import ingest_all
from orpo_ray.preference.errors import DataError
from orpo_ray.storage.files import one_line
from orpo_ray.storage.folder import Folder
from orpo_ray.training.estimate import plan_lines
from orpo_ray.version import __version__

_PACKAGES = (
    *("torch", "ray", "transformers", "tokenizers", "accelerate", "datasets", "pyarrow", "numpy"),
    *("safetensors", "peft", "liger-kernel", "bitsandbytes", "torchao", "flash-attn"),
)
_VARIABLES = (
    "RAY_ADDRESS",
    "RAY_TMPDIR",
    "TMPDIR",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "ORPO_RAY_SCRATCH",
)
_ROWS, _SHOWN_REFUSED = 64, 3
_GIB = 2**30
# Ray warns below this; below the other its object store moves to the temporary folder.
_LEAST_FILES, _LEAST_SHM_GIB = 4096, 1.0


@dataclass
class Examination:
    """What was found.

    Args:
        problems: of this machine and the cluster, a line each.
        config_problems: of the config, its model and its data.
    """

    problems: list[str] = field(default_factory=list)
    config_problems: list[str] = field(default_factory=list)


def examine(config: Callable[[], ORPOConfig], show: Callable[[str], object]) -> Examination:
    """Look at versions, limits, storage, cluster, model and data.

    Args:
        config: reads the config of the run that is asked about.
        show: called with every line of the page, which it has to hide secrets in.
    """
    found = Examination()
    for name, value in _versions():
        show(f"{name}: {value}")
    for variable in _VARIABLES:
        if variable in os.environ:
            show(f"{variable}={os.environ[variable]}")
    try:
        settings = config()
    except ConfigError as error:
        found.config_problems += error.lines
        settings = None
    place = Folder.at("runs" if settings is None else settings.output.output_dir)
    for text in (*_limits(place, found), *_storage(place, found), *_cluster(found)):
        show(text)
    if settings is not None:
        for text in _config(settings, found):
            show(text)
    return found


def _versions() -> Iterator[tuple[str, str]]:
    yield "orpo_ray", __version__
    yield "python", f"{sys.version.split()[0]} on {platform.platform()}"
    for name in _PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    yield "CUDA", torch.version.cuda or "none in this torch"
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        yield f"GPU {number}", f"{about.name}, {about.total_memory / _GIB:.0f} GiB"


def _limits(place: Folder, found: Examination) -> Iterator[str]:
    """What this machine allows: files, shared memory, disks, memory, ports."""
    n_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield f"open files: {n_files} (ulimit -n)"
    if 0 <= n_files < _LEAST_FILES:
        found.problems.append(f"open files: {n_files} are too few for Ray; ulimit -n 65536")
    shared = shutil.disk_usage("/dev/shm")
    yield f"/dev/shm: {shared.free / _GIB:.1f} of {shared.total / _GIB:.1f} GiB free"
    if shared.total < _LEAST_SHM_GIB * _GIB:
        yield "warning: /dev/shm is small: Ray's objects go to the disk; docker run --shm-size=4g"
    for name, path in (("temporary folder", tempfile.gettempdir()), ("output_dir", place.path)):
        usage = shutil.disk_usage(_existing(Path(path)))
        yield f"disk of {name} {path}: {usage.free / _GIB:.1f} of {usage.total / _GIB:.1f} GiB free"
        if usage.free < _GIB:
            found.problems.append(f"{name}: {path} has less than 1 GiB free")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    yield f"memory: {memory:.1f} GiB; limit of the cgroup: {_memory_limit()}"
    with socket.socket() as free:
        try:
            free.bind(("", 0))
            yield f"ports: {Path('/proc/sys/net/ipv4/ip_local_port_range').read_text().strip()}"
        except OSError as error:
            found.problems.append(f"ports: none can be opened: {one_line(error)}")


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _memory_limit() -> str:
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        path = Path("/sys/fs/cgroup", name)
        text = path.read_text().strip() if path.exists() else "max"
        if text.isdigit() and int(text) < 2**60:
            return f"{int(text) / _GIB:.1f} GiB"
    return "none"


def _storage(place: Folder, found: Examination) -> Iterator[str]:
    """Whether a run could be written, by writing and deleting a file."""
    name, was_there = f".doctor-{os.getpid()}", place.path.exists()
    try:
        place.make().write_text(name, "")
        place.remove(name)
        if not was_there:
            place.path.rmdir()
        yield f"output_dir: {place} can be written"
    except OSError as error:
        found.problems.append(f"output_dir: {place} cannot be written: {one_line(error)}")


def _cluster(found: Examination) -> Iterator[str]:
    """What Ray has, after joining the cluster or starting it as a run would."""
    try:
        connection.connect()
    except ConfigError as error:
        found.problems += error.lines
        return
    nodes = [node for node in ray.nodes() if node["Alive"]]
    yield f"Ray: {len(nodes)} node(s), {ray.get_runtime_context().gcs_address}"
    for node in nodes:
        amounts = {n: v for n, v in node["Resources"].items() if not n.startswith("node:")}
        units = {n: v / _GIB if "memory" in n else v for n, v in sorted(amounts.items())}
        shown = ", ".join(f"{n} {v:.4g}{' GiB' if 'memory' in n else ''}" for n, v in units.items())
        yield f"  {node['NodeManagerAddress']}: {shown}"
    free = ray.available_resources()
    yield f"  free: CPU {free.get('CPU', 0):g}, GPU {free.get('GPU', 0):g}"


def _config(config: ORPOConfig, found: Examination) -> Iterator[str]:
    """What a config names: its batch and memory, its model on the meta device, a few rows."""
    if config.model.model_name_or_path is None and config.data.train_files is None:
        yield "config: the demo's model and pairs"
        return
    try:
        yield from plan_lines(config)
        if config.data.dataset_name is not None:
            yield "data: of the hub, which is not looked at"
            return
        with tempfile.TemporaryDirectory() as cache:
            few = config.replace(token_cache_dir=cache, val_set_size=0.0, shard_rows=_ROWS)
            only_evals = few.data.train_files is None
            inputs = find_inputs(few, Folder.at(few.output.output_dir), only_evals)
            sets = ingest_all(few, inputs, Folder.at(cache), only_evals, _map_a_few)
            check_model(few, inputs.model, sets)
            for name, tokens in sets.items():
                report, shown = tokens.report, name.rstrip("_")
                yield (
                    f"{shown} data: of the first {report['rows_read']} rows "
                    f"{report['rows_kept']} are kept as {', '.join(report['shapes']) or 'none'}"
                )
                refused = first_refused(tokens, _SHOWN_REFUSED)
                if not tokens.n_pairs:
                    found.config_problems.append(f"{shown} data: none of these rows can be used")
                yield from (f"  {line}" for line in refused)
    except (ConfigError, DataError) as error:
        found.config_problems += error.lines
    except (OSError, ValueError, KeyError) as error:  # also what transformers says of a model
        found.config_problems.append(f"model_name_or_path: {one_line(error)}")


def _map_a_few(items: list[dict[str, Any]], work: Any) -> list[dict[str, Any]]:
    """`MapTasks` in this process, of the first split of every file."""
    answers, seen = [], set()
    for item in items:
        if "split" in item and item["source"] in seen:
            continue
        seen.add(item.get("source"))
        answers += [json.loads(answer["item"]) for answer in work({"item": json.dumps(item)})]
    return answers
