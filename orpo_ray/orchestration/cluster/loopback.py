"""A Ray of this machine alone: it listens on loopback, and so do the workers' process groups.

Ray, torch's store and gloo listen on every interface of a machine by default. Where Ray is started
for one run there is nobody to reach them from elsewhere but those who should not.
"""

import contextlib
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import (
    _set_torch_distributed_env_vars,
    _setup_torch_process_group,
    _TorchBackend,
)

from orpo_ray.orchestration.cluster.exposure import reachable_addresses

# Ray's switch for systems whose firewall asks about each port; its processes read it as they start.
_SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


def keep_to_this_machine() -> None:
    """Have a Ray that is started from here on listen on loopback only; its processes inherit it."""
    from ray._private import ray_constants

    os.environ[_SWITCH] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False  # read when Ray was imported


def keep_token_private() -> None:
    """Make the token of a local Ray for this user alone; Ray writes it readable for everyone.

    Nothing is done where the token comes by other ways, and for a file of another user.
    """
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_MODE") == "disabled":
        return
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named).expanduser() if named else Path.home() / ".ray" / "auth_token"
    if not path.exists():
        if named:
            return  # Ray says what is wrong with it
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(file, "w") as opened:
                opened.write(secrets.token_hex(32))
    elif path.stat().st_uid == os.getuid() and path.stat().st_mode & 0o077:
        path.chmod(0o600)


def is_loopback_only() -> bool:
    """Whether Ray is of this machine alone."""
    return not reachable_addresses(n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"])


def torch_config(backend: str, timeout_s: int) -> TorchConfig:
    """The process group of the workers, over loopback where Ray is of this machine alone."""
    kind = _LoopbackTorchConfig if is_loopback_only() else TorchConfig
    return kind(backend=backend, timeout_s=timeout_s)


def interface_settings() -> Mapping[str, str]:
    """Environment of the workers by which gloo and NCCL choose an interface."""
    if not is_loopback_only():
        return {}
    loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return {name: loopback[0] for name in names if loopback and name not in os.environ}


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
