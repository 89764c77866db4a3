"""A Ray that is started for a run: its token is private, and what it starts is on loopback."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from orpo_ray.orchestration.cluster.loopback import keep_token_private
from tests.conftest import ROOT

LISTENS = """
import json, os, psutil, ray
from orpo_ray.orchestration.cluster import connection
from orpo_ray.orchestration.cluster.loopback import interface_settings, is_loopback_only
from orpo_ray.orchestration.cluster.process_group import torch_config

connection.connect()
mine = [psutil.Process(), *psutil.Process().children(recursive=True)]
found = [c.laddr.ip for p in mine for c in p.net_connections() if c.status == "LISTEN"]
print(json.dumps({
    "listens": sorted(set(found)),
    "loopback": is_loopback_only(),
    "store": type(torch_config("gloo", 10)).__name__,
    "gloo": interface_settings().get("GLOO_SOCKET_IFNAME"),
    "statistics": os.environ["RAY_USAGE_STATS_ENABLED"],
}))
"""


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN_PATH", "RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_token_is_made_for_its_user_alone(home):
    umask = os.umask(0)
    try:
        keep_token_private()
    finally:
        os.umask(umask)
    path = home / ".ray" / "auth_token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(path.read_text()) == 64
    path.chmod(0o644)
    before = path.read_text()
    keep_token_private()
    assert (stat.S_IMODE(path.stat().st_mode), path.read_text()) == (0o600, before)


@pytest.mark.parametrize(
    ("name", "value"), [("RAY_AUTH_TOKEN", "t" * 40), ("RAY_AUTH_MODE", "disabled")]
)
def test_no_token_is_made_where_none_is_read(home, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    keep_token_private()
    assert not (home / ".ray").exists()


@pytest.mark.commands
def test_a_local_ray_listens_on_loopback_only(home):
    done = subprocess.run(
        [sys.executable, "-c", LISTENS],
        cwd=ROOT,
        env={n: v for n, v in os.environ.items() if n != "RAY_ADDRESS"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert {ip.removeprefix("::ffff:") for ip in said["listens"]} == {"127.0.0.1"}
    assert said["loopback"] is True
    assert said["store"] == "_LoopbackTorchConfig"
    assert said["gloo"].startswith("lo")
    assert said["statistics"] == "0"
