"""What all tests share: where things are, and the environment of commands run as a user would."""

import os
import secrets
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # read when TRL's ORPO, an oracle, is imported
SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def ray_token(tmp_path_factory) -> None:
    """Ray refuses an empty token and would write one into the home folder."""
    path = tmp_path_factory.mktemp("token") / "token"
    path.write_text(secrets.token_hex(32))
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real preference data, which lies beside a checkout and not in it."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the real preference data is not beside this checkout")
    return SHARED_DATA


@pytest.fixture(scope="session")
def run_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command of the project in a folder: `run_command(folder, "jobs/train.py", ...)`."""

    def run(
        folder: Path, script: str, *arguments: str, timeout_s: float = 280
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / script), *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    return run
