"""Which Ray cluster a command joins, and whether one answers there; on the driver."""

import logging
import os
import socket

import grpc
from ray._private.utils import get_ray_address_file, read_ray_address
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from orpo_ray.config.schema import ConfigError

LOCAL = "local"
# Ray's own client would try for many minutes, and log that in C++.
_TIMEOUT_S = 10.0
_IS_RAY = (grpc.StatusCode.OK, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
_log = logging.getLogger(__name__)


def cluster_address() -> str:
    """The address for `ray.init`: of a cluster that answers, or `local` to start Ray here.

    Without RAY_ADDRESS it is the cluster that `ray start` has left in a file on this machine.

    Raises:
        ConfigError: when RAY_ADDRESS is set and no cluster answers there.
    """
    named = os.environ.get("RAY_ADDRESS", "")
    source, address = "RAY_ADDRESS", named
    if named in ("", "auto"):
        source, address = get_ray_address_file(None), read_ray_address(None) or ""
    if not address:
        return named or LOCAL
    if address == LOCAL or "://" in address or answers(address):
        if not named:
            _log.info("joining the Ray cluster at %s, which %s names", address, source)
        return address
    if named:
        raise ConfigError(
            [
                f"{source}: no Ray cluster answers at {address}; start it, or unset RAY_ADDRESS to "
                "start Ray on this machine"
            ]
        )
    _log.info("%s: no Ray cluster answers at %s; starting Ray on this machine", source, address)
    return LOCAL


def answers(address: str) -> bool:
    """Whether the control store (GCS) of a Ray cluster answers at `host:port` within seconds."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return False
    if os.environ.get("RAY_USE_TLS", "0") in ("0", "", "false"):
        return control_store_status(address) in _IS_RAY
    try:
        socket.create_connection((host, int(port)), _TIMEOUT_S).close()
    except OSError:
        return False
    return True


def control_store_status(address: str) -> grpc.StatusCode:
    """How a control store answers a question without a token.

    Args:
        address: of the control store (GCS), `host:port`.
    """
    options = [("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(address, options) as channel:
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            stub.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            status: grpc.StatusCode = error.code()
            return status
    return grpc.StatusCode.OK
