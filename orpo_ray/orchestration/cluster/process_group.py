"""The process group of the workers, over loopback where Ray is of this machine alone."""

import shutil
import tempfile
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import (
    _set_torch_distributed_env_vars,
    _setup_torch_process_group,
    _TorchBackend,
)

from orpo_ray.orchestration.cluster.loopback import is_loopback_only


def torch_config(backend: str, timeout_s: int) -> TorchConfig:
    """The process group of the workers, over loopback where Ray is of this machine alone."""
    kind = _LoopbackTorchConfig if is_loopback_only() else TorchConfig
    return kind(backend=backend, timeout_s=timeout_s)


class _LoopbackTorchConfig(TorchConfig):  # type: ignore[misc]
    """Torch's store as a file: as a server it would listen on every interface."""

    @property
    def backend_cls(self) -> type[Any]:
        return _FileStoreBackend


class _FileStoreBackend(_TorchBackend):  # type: ignore[misc]
    """Ray's backend with a store in a file, in a folder of this user's for each worker group."""

    def __init__(self) -> None:
        self._folder: str | None = None

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Join the workers of a group to a process group."""
        self._folder = worker_group.execute_single(0, _make_folder)
        worker_group.execute(_set_torch_distributed_env_vars)
        size = len(worker_group)
        joined = [
            worker_group.execute_single_async(
                rank,
                _setup_torch_process_group,
                backend=backend_config.backend,
                world_rank=rank,
                world_size=size,
                init_method=f"file://{self._folder}/store",
                timeout_s=backend_config.timeout_s,
            )
            for rank in range(size)
        ]
        ray.get(joined)

    def on_shutdown(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Leave the process group, and delete its store."""
        super().on_shutdown(worker_group, backend_config)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)  # all of it is on this machine


def _make_folder() -> str:
    return tempfile.mkdtemp(prefix="orpo_ray-store-")
