"""A Ray of this machine alone: it listens on loopback; on the driver.

Ray, and gloo in its workers, listen on every interface of a machine by default. Where Ray is
started for one run there is nobody to reach them from elsewhere but those who should not.
"""

import contextlib
import os
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path

import ray

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


def interface_settings() -> Mapping[str, str]:
    """Environment of the workers by which gloo and NCCL choose an interface."""
    if not is_loopback_only():
        return {}
    loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return {name: loopback[0] for name in names if loopback and name not in os.environ}
