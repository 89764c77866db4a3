"""The commands as `ray job submit` runs them, on two nodes that ask for a token."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from orpo_ray.demo.model import make_demo_model
from tests.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
BIN = Path(sys.executable).parent
PAGE = ROOT / "docs" / "ray.md"


def free_ports(n: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@dataclass(frozen=True)
class JobCluster:
    """A head and a second node; `ray job ...` against it."""

    address: str
    environment: dict[str, str]

    def ray(self, *arguments: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
        """Run a command of Ray from this checkout."""
        return subprocess.run(
            [BIN / "ray", *arguments],
            cwd=ROOT,
            env=self.environment | {"RAY_API_SERVER_ADDRESS": self.address},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def submit(self, name: str, *command: str, wait: bool = True) -> str:
        """Submit a command from this checkout and give what it printed."""
        how = ["--submission-id", name, "--working-dir", ".", *([] if wait else ["--no-wait"])]
        done = self.ray("job", "submit", *how, "--", "python", *command)
        return done.stdout + done.stderr

    def status(self, name: str) -> str:
        """What Ray says of a job: stopped, succeeded, failed."""
        done = self.ray("job", "status", name)
        told = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
        found = re.search(rf"Job '{name}' (?:was )?(stopped|succeeded|failed)", told)
        assert found is not None, told
        return found[1]


@pytest.fixture(scope="module")
def job_cluster() -> Iterator[JobCluster]:
    """Started as cluster/README.md says, on ports of its own; ended by SIGTERM to its processes."""
    # A path of pytest's would be too long for the sockets in it.
    folder = Path(tempfile.mkdtemp(prefix="orpo-"))
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    environment.pop("RAY_ADDRESS", None)
    port, dashboard, client, *agents = free_ports(5)
    common = ["--block", "--num-cpus=1", "--node-ip-address=127.0.0.1"]
    head = [f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
    head += [f"--ray-client-server-port={client}", f"--temp-dir={folder}/ray"]
    starts = [
        ["--head", *head, f"--dashboard-agent-listen-port={agents[0]}"],
        [f"--address=127.0.0.1:{port}", f"--dashboard-agent-listen-port={agents[1]}"],
    ]
    cluster = JobCluster(f"http://127.0.0.1:{dashboard}", environment)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for number, arguments in enumerate(starts):
            log = stack.enter_context((folder / f"node-{number}.log").open("w"))
            command = [BIN / "ray", "start", *common, *arguments]
            node = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            stack.callback(end, node)
            wait_for_text(Path(log.name), "Ray runtime started")
        wait_for(lambda: cluster.ray("job", "list").returncode == 0, 60)
        yield cluster


def end(node: subprocess.Popen) -> None:
    node.terminate()
    node.wait(timeout=60)


def wait_for(
    condition: Callable[[], object], timeout_s: float, told: Callable[[], str] = lambda: ""
) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, told()
        time.sleep(0.3)


def wait_for_text(path: Path, text: str) -> None:
    wait_for(lambda: text in path.read_text(), 60, path.read_text)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {"prompt": f"What is {i} + 1?", "chosen": f"It is {i + 1}.", "rejected": f"It is {i}."}
        for i in range(200)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def last_step(run: Path) -> int:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else -1


def test_without_the_token_nobody_submits(job_cluster, pairs):
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{job_cluster.address}/api/jobs/", timeout=10)


def test_a_job_that_is_stopped_saves_and_goes_on_when_it_is_submitted_again(
    job_cluster, pairs, tmp_path
):
    """A checkpoint is due at step 100000 only: what is there at the stop is what was asked for."""
    run = tmp_path / "runs" / "stopped"
    command = [
        "jobs/train.py",
        f"train_files={pairs}",
        f"output_dir={tmp_path}/runs",
        "run_name=stopped",
        "num_workers=2",
        "logging_steps=5",
        "save_steps=100000",
    ]
    job_cluster.submit("first", *command, "max_steps=100000", wait=False)
    wait_for(
        lambda: last_step(run) >= 20, 150, lambda: job_cluster.ray("job", "logs", "first").stdout
    )
    job_cluster.ray("job", "stop", "first")
    assert job_cluster.status("first") == "stopped"
    (manifest,) = run.glob("checkpoints/step-*/MANIFEST.json")
    saved = int(manifest.parent.name.removeprefix("step-"))
    assert saved >= 20
    logs = job_cluster.ray("job", "logs", "first").stdout
    assert (
        f"stopped at step {saved} of 100000; the same command with the same run_name goes on"
        in logs
    )
    steps = re.findall(r"^step (\d+)/100000 ", logs, flags=re.MULTILINE)
    assert steps == [str(step) for step in range(5, 5 * len(steps) + 1, 5)]
    assert "pid=" not in logs
    again = job_cluster.submit("second", *command, f"max_steps={saved + 20}")
    assert f"resumed at step {saved} of {saved + 20}" in again
    assert job_cluster.status("second") == "succeeded"
    assert (run / "final" / "model.safetensors").exists()


def test_every_command_runs_as_a_job_and_its_exit_code_is_the_jobs(job_cluster, pairs, tmp_path):
    common = [f"output_dir={tmp_path}/runs"]
    train = [f"train_files={pairs}", *common, "max_steps=6"]
    job_cluster.submit("check", "jobs/prepare.py", *train, "run_name=check")
    assert (tmp_path / "runs" / "check" / "data_report.html").exists()
    sweep = ["tune.num_samples=1", "compare_beta_zero=false", f"eval_files={pairs}"]
    told = job_cluster.submit("sweep", "jobs/tune.py", *train, *sweep, "run_name=sweep")
    assert job_cluster.status("sweep") == "succeeded", told
    model = f"model_name_or_path={tmp_path}/runs/sweep/champion"
    files = f"eval_files={pairs}"
    told = job_cluster.submit("look", "jobs/evaluate.py", model, files, *common, "run_name=look")
    assert job_cluster.status("look") == "succeeded", told
    assert (tmp_path / "runs" / "look" / "scores.parquet").exists()
    told = job_cluster.submit("wrong", "jobs/train.py", "beta=-1", *common)
    assert job_cluster.status("wrong") == "failed"
    assert "error: orpo.beta" in told
    assert "exit code 2" in told


def test_the_job_of_the_page_on_ray(job_cluster, pairs, tmp_path):
    """As docs/ray.md shows it, with a folder in place of /data."""
    (command,) = [line for line in PAGE.read_text().splitlines() if line.startswith("ray job ")]
    shutil.copy(pairs, tmp_path)
    make_demo_model(str(tmp_path / "base"), [pairs.read_text()], 1)
    arguments = command.partition("-- python ")[2].replace("/data", str(tmp_path)).split()
    told = job_cluster.submit("page", *arguments)
    assert job_cluster.status("page") == "succeeded", told
    assert (tmp_path / "runs" / "as_job" / "final" / "model.safetensors").exists()
