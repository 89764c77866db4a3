"""What all tests share: where things are, and the environment of commands run as a user would."""

import gc
import os
import secrets
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # read when TRL's ORPO, an oracle, is imported
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def ray_token(tmp_path_factory) -> None:
    """Ray refuses an empty token and would write one into the home folder."""
    path = tmp_path_factory.mktemp("token") / "token"
    path.write_text(secrets.token_hex(32))
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)


@pytest.fixture(scope="module")
def ray_cluster(ray_token: None) -> Iterator[str]:
    """Ray on this machine with two CPUs, for the tests of one module; gives its address.

    Its token is the session's: Ray reads a token once a process and keeps it.
    """
    import ray

    context = ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield context.address_info["gcs_address"]
    with warnings.catch_warnings():
        # Ray does not wait for its daemons to end; the warning would hit some later test.
        warnings.simplefilter("ignore", ResourceWarning)
        ray.shutdown()
        gc.collect()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real preference data, which lies beside a checkout and not in it."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the real preference data is not beside this checkout")
    return SHARED_DATA


@pytest.fixture(scope="session")
def run_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command of the project in a folder: `run_command(folder, "jobs/train.py", ...)`.

    It starts a Ray of its own, or joins the one at `ray_address`.
    """

    def run(
        folder: Path,
        script: str,
        *arguments: str,
        ray_address: str | None = None,
        timeout_s: float = 280,
    ) -> subprocess.CompletedProcess[str]:
        joins = {"RAY_ADDRESS": ray_address} if ray_address else {}
        return subprocess.run(
            [sys.executable, str(ROOT / script), *arguments],
            cwd=folder,
            env=os.environ | joins,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    return run
