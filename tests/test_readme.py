"""The README is true: its commands and its Python block run as they stand."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from orpo_ray.config.file import load_config
from orpo_ray.config.schema import SECTIONS
from tests.conftest import ROOT

TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


def commands(start: str) -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [line.split() for line in lines if line.startswith(start)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder as the README's reader has it: some pairs, and the config file it shows."""
    path = tmp_path_factory.mktemp("readme")
    pairs = [
        {"prompt": f"What is {i} + 1?", "chosen": f"It is {i + 1}.", "rejected": f"It is {i}."}
        for i in range(200)
    ]
    (path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (path / "my.yaml").write_text(blocks("yaml")[0])
    return path


@pytest.mark.commands
@pytest.mark.timeout(900)
def test_the_commands_run_in_the_order_they_are_shown(folder, run_command, ray_cluster):
    for command in commands("python jobs/"):
        # A sweep brings its own Ray, with the dashboard that frees what stopped trials held.
        address = None if command[1] == "jobs/tune.py" else ray_cluster
        done = run_command(folder, *command[1:], ray_address=address)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
        assert "Traceback" not in done.stderr
    log = (folder / "runs" / "first" / "run.log").read_text()
    assert "resumed at step 20 of 30" in log
    assert (folder / "runs" / "sweep" / "sweep_report.html").exists()
    for name in ("first", "second"):
        shown = re.findall(r"^\| `([^`*X]+?)/?` \|", TEXT, flags=re.MULTILINE)
        there = [n for n in shown if (folder / "runs" / name / n).exists()]
        always = {"config.yaml", "data_report.json", "metrics.jsonl", "ledger.jsonl"}
        assert always | {"final", "run.log"} <= {*there}
        assert list((folder / "runs" / name).glob("checkpoints/step-*/MANIFEST.json"))


@pytest.mark.commands
def test_the_python_block_runs(folder, ray_cluster, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    exec(compile(blocks("python")[0], "README.md", "exec"), {})
    model = Path(capsys.readouterr().out.strip().splitlines()[-1])
    assert (model / "model.safetensors").exists()


def test_the_two_commands_are_targets_of_make():
    """They install and run for minutes; here it is shown that make knows what to do."""
    for command in commands("make"):
        done = subprocess.run(
            [command[0], "--dry-run", *command[1:]],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert (
        "bin/python jobs/train.py"
        in subprocess.run(
            ["make", "--dry-run", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    )


def test_every_yaml_block_is_a_config(tmp_path):
    for number, text in enumerate(blocks("yaml")):
        (tmp_path / f"{number}.yaml").write_text(text)
        load_config(str(tmp_path / f"{number}.yaml"), [])


def test_the_table_has_every_setting_with_its_default():
    for section, model in SECTIONS.items():
        for name, field in model.model_fields.items():
            default = json.dumps(field.get_default(), default=list)
            assert f"| `{section}.{name}` | `{default}` | {field.description} |" in TEXT
