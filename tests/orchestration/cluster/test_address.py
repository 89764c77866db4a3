"""Which cluster a command joins, by addresses where nothing, something else or Ray answers."""

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orpo_ray.config.schema import ConfigError
from orpo_ray.orchestration.cluster.address import answers, cluster_address


@pytest.fixture
def temporary(monkeypatch, tmp_path) -> Path:
    """Ray's folder for temporary files, in which `ray start` leaves an address."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    return tmp_path


@pytest.fixture
def dead_address() -> str:
    """Where nothing listens any more."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def another_server() -> Iterator[str]:
    """The address of a server that is not Ray's and hangs up on whoever connects."""
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def test_without_any_address_ray_is_started_here(temporary):
    assert cluster_address() == "local"


def test_a_named_cluster_that_is_gone_is_refused(temporary, monkeypatch, dead_address):
    monkeypatch.setenv("RAY_ADDRESS", dead_address)
    with pytest.raises(ConfigError) as refused:
        cluster_address()
    (line,) = refused.value.lines
    assert line.startswith(f"RAY_ADDRESS: no Ray cluster answers at {dead_address}; ")


def test_a_port_of_another_program_is_no_cluster(another_server):
    assert not answers(another_server)


@pytest.mark.parametrize("address", ["head", "head:port", ":6379", ""])
def test_what_is_no_address_does_not_answer(address):
    assert not answers(address)


def test_a_file_of_a_cluster_that_is_gone_is_said_and_passed_over(temporary, dead_address, caplog):
    caplog.set_level(logging.INFO, "orpo_ray")
    file = temporary / "ray" / "ray_current_cluster"
    file.write_text(f"{dead_address}\n")
    assert cluster_address() == "local"
    assert f"{file}: no Ray cluster answers at {dead_address}" in caplog.text


def test_auto_with_a_file_of_a_cluster_that_is_gone_is_refused(
    temporary, monkeypatch, dead_address
):
    (temporary / "ray" / "ray_current_cluster").write_text(dead_address)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(ConfigError, match=r"ray_current_cluster: no Ray cluster answers at"):
        cluster_address()


def test_a_cluster_that_answers_is_joined_by_name_and_by_file(
    temporary, monkeypatch, ray_cluster, caplog
):
    caplog.set_level(logging.INFO, "orpo_ray")
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster)
    assert cluster_address() == ray_cluster
    assert caplog.text == ""
    monkeypatch.delenv("RAY_ADDRESS")
    (temporary / "ray" / "ray_current_cluster").write_text(ray_cluster)
    assert cluster_address() == ray_cluster
    assert "joining the Ray cluster" in caplog.text


ASK = """
from orpo_ray.config.schema import ConfigError
from orpo_ray.orchestration.cluster.address import cluster_address
try:
    print(cluster_address())
except ConfigError as error:
    print(*error.lines, sep="\\n")
"""


@pytest.mark.parametrize(("mode", "token"), [("token", "ours"), ("token", "other"), (None, None)])
def test_a_cluster_with_another_token_is_refused_at_once(ray_cluster, tmp_path, mode, token):
    """In a process of its own: Ray reads its token once."""
    environment = dict(os.environ, RAY_ADDRESS=ray_cluster)
    environment.pop("RAY_AUTH_MODE", None)
    if mode:
        environment["RAY_AUTH_MODE"] = mode
    if token == "other":
        (tmp_path / "token").write_text("b" * 64)
        environment["RAY_AUTH_TOKEN_PATH"] = str(tmp_path / "token")
    asked = subprocess.run(
        [sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, timeout=120
    )
    if token == "ours":
        assert asked.stdout == f"{ray_cluster}\n"
        return
    told = f"RAY_ADDRESS: the Ray cluster at {ray_cluster} asks for a token, which this process "
    assert asked.stdout.startswith(told), asked.stderr
    assert asked.stdout.count("\n") == 1
