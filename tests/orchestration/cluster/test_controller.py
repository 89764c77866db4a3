"""Ray Train's controller: what it is told, and runs in which it is killed."""

import json
import os

import psutil
import pytest
import ray
from ray.train import RunConfig, ScalingConfig

from orpo_ray.orchestration.cluster.controller import Trainer, fit
from tests.background import Command, start

SETTINGS = ("max_steps=40", "save_steps=5")


def kill_controller(command: Command) -> None:
    command.until(lambda command: list(command.run.glob("checkpoints/*/MANIFEST.json")))
    children = psutil.Process(command.process.pid).children(recursive=True)
    (controller,) = (c for c in children if "TrainController" in " ".join(c.cmdline()))
    controller.kill()


def test_what_ray_train_starts_knows_its_own_ray(ray_cluster, tmp_path, monkeypatch):
    """Else it looks for one, and finds another of this machine, or one that has long ended."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def make() -> Trainer:
        return Trainer(
            lambda: os.environ.get("RAY_ADDRESS"),
            scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(name="run", storage_path=str(tmp_path)),
        )

    address = ray.get_runtime_context().gcs_address
    assert fit(make, max_failures=0, stops=lambda: False) == address
    assert "RAY_ADDRESS" not in os.environ


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_another_controller_begins_at_the_newest_checkpoint(tmp_path):
    """Without a person, although nothing restarts a controller of Ray Train."""
    command = start(tmp_path, "train", *SETTINGS)
    kill_controller(command)
    assert command.end() == 0, command.printed
    assert "warning: Ray Train's controller died: " in command.printed
    ledger = (command.run / "ledger.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in ledger] == list(range(1, 41))
    assert (command.run / "final" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_beyond_max_failures_a_line_says_how_to_go_on(tmp_path):
    command = start(tmp_path, "train", *SETTINGS, "max_failures=0")
    kill_controller(command)
    assert command.end() == 1
    assert "Traceback" not in command.printed
    last = command.printed.splitlines()[-1]
    assert last.startswith("error: Ray Train's controller died: ")
    assert last.endswith("; the same command with the same run_name goes on")
