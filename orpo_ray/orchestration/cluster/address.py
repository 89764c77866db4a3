"""Which Ray cluster a command joins, and whether one answers there; on the driver."""

import logging
import os
import socket

import grpc
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._private.authentication.grpc_authentication_client_interceptor import (
    SyncAuthenticationMetadataClientInterceptor,
)
from ray._private.utils import get_ray_address_file, read_ray_address
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from orpo_ray.config.schema import ConfigError

LOCAL = "local"
# Ray's own client would try for many minutes, and log that in C++.
_TIMEOUT_S = 10.0
_REFUSES_TOKEN = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
_IS_RAY = (grpc.StatusCode.OK, *_REFUSES_TOKEN)
_log = logging.getLogger(__name__)


def cluster_address() -> str:
    """The address for `ray.init`: of a cluster that answers, or `local` to start Ray here.

    Without RAY_ADDRESS it is the cluster that `ray start` has left in a file on this machine.

    Raises:
        ConfigError: when RAY_ADDRESS is set and no cluster answers there, and for a cluster that
            does not take this process's token.
    """
    named = os.environ.get("RAY_ADDRESS", "")
    source, address = "RAY_ADDRESS", named
    if named in ("", "auto"):
        source, address = get_ray_address_file(None), read_ray_address(None) or ""
    if not address:
        return named or LOCAL
    if address == LOCAL or "://" in address or answers(address):
        _refuse_another_token(source, address)
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
    if not _has_tls():
        return control_store_status(address) in _IS_RAY
    try:
        socket.create_connection((host, int(port)), _TIMEOUT_S).close()
    except OSError:
        return False
    return True


def _has_tls() -> bool:
    return os.environ.get("RAY_USE_TLS", "0") not in ("0", "", "false")


def _refuse_another_token(source: str, address: str) -> None:
    """Say at once what Ray finds out in a minute of tries.

    Raises:
        ConfigError: for a cluster that asks for a token which this process does not have.
    """
    if address == LOCAL or "://" in address or _has_tls():
        return
    if control_store_status(address, is_token_auth_enabled()) in _REFUSES_TOKEN:
        raise ConfigError(
            [
                f"{source}: the Ray cluster at {address} asks for a token, which this process does "
                "not have; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file with the "
                "cluster's token, or RAY_ADDRESS=local to start Ray on this machine"
            ]
        )


def control_store_status(address: str, with_token: bool = False) -> grpc.StatusCode:
    """How a control store answers a question.

    Args:
        address: of the control store (GCS), `host:port`.
        with_token: send the token that Ray would.
    """
    options = [("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(address, options) as channel:
        sender = SyncAuthenticationMetadataClientInterceptor()
        asked = grpc.intercept_channel(channel, sender) if with_token else channel
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(asked)
        try:
            stub.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            status: grpc.StatusCode = error.code()
            return status
    return grpc.StatusCode.OK
