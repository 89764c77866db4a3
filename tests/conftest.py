"""What all tests share: where things are, and the environment of commands run as a user would."""

import gc
import logging
import os
import runpy
import secrets
import subprocess
import sys
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import Ranks
from tests.reference.small_run import make_inputs, train_small

ROOT = Path(__file__).resolve().parent.parent
if "PYTEST_XDIST_WORKER" in os.environ:  # another process has the other core
    torch.set_num_threads(1)
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # read when TRL's ORPO, an oracle, is imported
SHARED_DATA = ROOT.parent / "shared" / "data"
STARTS = {"run_ranks": "ranks", "ray_on_demand": "ray"}  # by fixture, the mark of its tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by what their fixtures start."""
    for item in items:
        for fixture, mark in STARTS.items():
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(mark)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("needs_gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session", autouse=True)
def ray_token(tmp_path_factory) -> None:
    """Ray refuses an empty token and would write one into the home folder."""
    path = tmp_path_factory.mktemp("token") / "token"
    path.write_text(secrets.token_hex(32))
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """A server on this machine that speaks S3; gives its address."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def bucket(s3_server: str, tmp_path_factory) -> Iterator[Any]:
    """The bucket `bucket`, empty; gives a client of its server.

    Processes that are started meanwhile find the server by their environment.
    """
    import boto3

    urllib.request.urlopen(f"{s3_server}/moto-api/reset", data=b"").close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "id")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "key")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", s3_server)
        patch.setenv("ORPO_RAY_SCRATCH", str(tmp_path_factory.mktemp("scratch")))
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        yield client
        client.close()


class LocalRay:
    """Ray on this machine with two CPUs, started when a test first needs it."""

    def start(self) -> str:
        """Start it unless it runs; gives its address."""
        import ray

        if not ray.is_initialized():
            ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        return ray.get_runtime_context().gcs_address

    def stop(self) -> None:
        """Stop it if it runs."""
        import ray

        with warnings.catch_warnings():
            # Ray does not wait for its daemons to end; the warning would hit some later test.
            warnings.simplefilter("ignore", ResourceWarning)
            ray.shutdown()
            gc.collect()


@pytest.fixture(scope="session")
def ray_on_demand(ray_token: None) -> Iterator[LocalRay]:
    """The one Ray of the session.

    Its token is the session's: Ray reads a token once a process and keeps it.
    """
    local = LocalRay()
    yield local
    if "ray" in sys.modules:
        local.stop()


@pytest.fixture(scope="module")
def ray_cluster(ray_on_demand: LocalRay) -> str:
    """The address of the session's Ray, which runs."""
    return ray_on_demand.start()


@pytest.fixture(scope="module")
def no_ray(ray_on_demand: LocalRay) -> None:
    """No Ray runs in this process; for tests that start one of their own."""
    ray_on_demand.stop()


@pytest.fixture(scope="module")
def new_ray_cluster(ray_on_demand: LocalRay) -> Iterator[str]:
    """The address of a Ray whose processes have the environment that is set by now."""
    ray_on_demand.stop()
    yield ray_on_demand.start()
    ray_on_demand.stop()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real preference data, which lies beside a checkout and not in it."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the real preference data is not beside this checkout")
    return SHARED_DATA


@pytest.fixture(scope="session")
def run_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command of the project in a folder: `run_command(folder, "jobs/train.py", ...)`.

    A name without `.py` is a command of `orpo-ray`. It starts a Ray of its own, or joins the one at
    `ray_address`.
    """

    def run(
        folder: Path,
        script: str,
        *arguments: str,
        ray_address: str | None = None,
        timeout_s: float = 280,
    ) -> subprocess.CompletedProcess[str]:
        joins = {"RAY_ADDRESS": ray_address} if ray_address else {}
        program = [str(ROOT / script)] if script.endswith(".py") else ["-m", "orpo_ray", script]
        return subprocess.run(
            [sys.executable, *program, *arguments],
            cwd=folder,
            env=os.environ | joins,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def run_here() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command as `run_command` does, without a process of its own: it imports nothing anew.

    Where Ray runs here, the command joins it.

    Tests of what only a process shows (imports, signals, an exit) take `run_command`.
    """

    def run(folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(ROOT / script), *arguments]
        with pytest.MonkeyPatch.context() as patch, StringIO() as out, StringIO() as err:
            patch.chdir(folder)
            patch.setattr(sys, "argv", command)
            patch.setattr(sys, "path", list(sys.path))
            before = dict(os.environ)
            code: Any = 0
            try:
                with redirect_stdout(out), redirect_stderr(err):
                    runpy.run_path(command[0], run_name="__main__")
            except SystemExit as end:
                code = end.code or 0
            finally:
                for name in os.environ.keys() - before.keys():
                    del os.environ[name]
                os.environ.update(before)
            return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def run_ranks() -> Iterator[Callable[..., list[Any]]]:
    """Run a function on gloo processes: `run_ranks(2, function, ...)`, as `Ranks.run` says."""
    ranks = Ranks()
    yield ranks.run
    ranks.end()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """A small model and its token set; nothing writes into it."""
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.fixture(scope="session")
def whole_run(run_ranks: Callable[..., list[Any]], inputs: Path, tmp_path_factory) -> Path:
    """24 steps on two ranks, never interrupted; nothing writes into it."""
    run = tmp_path_factory.mktemp("whole") / "run"
    run_ranks(2, train_small, inputs, run, {})
    return run
