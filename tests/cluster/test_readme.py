"""cluster/README.md is true: what it names exists, and Ray takes the commands as they stand."""

import re
import shlex

import pytest

from orpo_ray.config.file import load_config
from tests.cluster.manifests import CLUSTER
from tests.conftest import ROOT

TEXT = (CLUSTER / "README.md").read_text()


def commands(start: str) -> list[list[str]]:
    """The arguments of the shown commands that begin so, without what the shell keeps."""
    blocks = re.findall(r"^```bash\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
    lines = [line.split(" > ")[0] for line in "".join(blocks).splitlines()]
    words = [shlex.split(line) for line in lines if line.startswith(start)]
    return [line[len(start.split()) :] for line in words]


def test_every_file_it_names_exists():
    named = set(re.findall(r"\b((?:cluster|jobs|tests)/[\w./-]*\w)", TEXT))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    assert {f"cluster/{path.name}" for path in CLUSTER.iterdir()} - {"cluster/README.md"} <= named


def test_ray_takes_its_commands():
    from ray.dashboard.modules.job import cli as job
    from ray.scripts import scripts

    known = {
        "ray start": scripts.start,
        "ray get-auth-token": scripts.get_auth_token,
        "ray exec": scripts.exec,
        "ray up": scripts.up,
        "ray down": scripts.down,
        "ray rsync-up": scripts.rsync_up,
        "ray job submit": job.submit,
        "ray job stop": job.stop,
        "ray job logs": job.logs,
    }
    for name, command in known.items():
        assert commands(name), name
        for arguments in commands(name):
            command.make_context(name, list(arguments))
    n_of_ray = len(commands("ray "))
    others = len(commands("ray status")) + len(commands("ray stop"))
    assert n_of_ray == sum(len(commands(name)) for name in known) + others


def test_the_jobs_it_submits_are_commands_with_settings_that_exist():
    for arguments in commands("ray job submit"):
        python, script, *settings = arguments[arguments.index("--") + 1 :]
        assert python == "python"
        assert (ROOT / "jobs" / script.rpartition("/")[2]).is_file()
        assert load_config(None, settings).output.run_name


@pytest.mark.parametrize("line", ["export RAY_AUTH_MODE=token", ". .venv/bin/activate"])
def test_the_token_and_the_venv_come_before_ray_starts(line):
    assert 0 <= TEXT.index(line) < TEXT.index("ray start --head")
