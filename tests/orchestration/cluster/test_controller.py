"""Ray Train's controller is killed in a run on a Ray of this machine."""

import json

import psutil
import pytest

from tests.background import Command, start

SETTINGS = ("max_steps=40", "save_steps=5")


def kill_controller(command: Command) -> None:
    command.until(lambda command: list(command.run.glob("checkpoints/*/MANIFEST.json")))
    children = psutil.Process(command.process.pid).children(recursive=True)
    (controller,) = (c for c in children if "TrainController" in " ".join(c.cmdline()))
    controller.kill()


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
