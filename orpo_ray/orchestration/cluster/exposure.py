"""Whether others could run code on the cluster that a run is attached to; on the driver."""

import ipaddress
from collections.abc import Iterable

import grpc
import ray

from orpo_ray.orchestration.cluster.address import control_store_status


def exposure_warning() -> str | None:
    """A line for a cluster that asks for no token and that other hosts can reach, else None."""
    addresses = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
    reachable = reachable_addresses(addresses)
    if not reachable or asks_for_token(ray.get_runtime_context().gcs_address):
        return None
    return (
        f"this Ray cluster asks for no token, and its nodes ({', '.join(reachable[:3])}) "
        "can be reached from other hosts: whoever reaches them runs code as you; set "
        "RAY_AUTH_MODE=token where Ray is started (SECURITY.md)"
    )


def reachable_addresses(addresses: Iterable[str]) -> list[str]:
    """The addresses that are not of this host alone, each once."""
    return sorted({address for address in addresses if not _is_loopback(address)})


def asks_for_token(address: str) -> bool:
    """Whether the cluster's control store turns away a question without a token.

    The driver's own settings do not say: with a token it joins a cluster that asks for none.
    Where nothing can be said, as with TLS, there is no warning either.

    Args:
        address: of the control store (GCS), `host:port`.
    """
    return control_store_status(address) is not grpc.StatusCode.OK


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
