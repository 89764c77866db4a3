"""Where a run stands, of directories that the writers of runs made."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orpo_ray.config.file import to_yaml
from orpo_ray.config.schema import ConfigError, ORPOConfig
from orpo_ray.reports.status import show_status
from orpo_ray.runs.files import RunFiles
from orpo_ray.runs.lock import claimed, last_driver
from orpo_ray.runs.manifest import checkpoint_directory, fingerprint, write_manifest
from orpo_ray.runs.status import RunStatus, SweepStatus, read_status
from orpo_ray.storage.folder import Folder
from tests.test_cli import imported_by

LONG_AGO_S = 1000.0
DATA = {
    "rows_read": 99,
    "rows_kept": 96,
    "rows_held_out": 0,
    "rows_refused": 3,
    "refused": {"empty_chosen": 3},
}


def write_run(run: Path, last_step: int = 30, **settings: Any) -> RunFiles:
    """A run of 60 steps, 120 an epoch, logged every 10th; a step takes 2 s by its parts."""
    run.mkdir(parents=True, exist_ok=True)
    config = ORPOConfig(num_train_epochs=0.5, run_name=run.name, **settings)
    (run / "config.yaml").write_text(to_yaml(config))
    (run / "data_report.json").write_text(json.dumps({"train": DATA}))
    files = RunFiles(Folder.at(run), is_writer=True)
    for step in range(0, last_step + 1, 10):
        line: dict[str, Any] = {"step": step, "epoch": step / 120}
        figures = {"loss": 5.0 - step / 10, "log_odds_chosen": 0.5, "rewards/accuracies": 0.75}
        if step:
            line |= figures | {"pairs_per_s": 4.0, "tokens_per_s": 100.0}
            line |= {"seconds/forward_backward": 15.0, "seconds/data_wait": 5.0}
        if step in (0, 20):
            line |= {f"eval_hard_{name}": value for name, value in figures.items()}
            line |= {"eval_hard_log_odds_chosen": 1.5}
            interval = {"accuracy": (0.75, 0.5, 0.875), "log_odds": (1.5, None, None)}
            files.evaluation(step, "eval_hard_", 40, interval)
        files.metrics(line)
    return files


def commit(run: Path, step: int) -> Path:
    directory = checkpoint_directory(run, step)
    directory.mkdir(parents=True)
    (directory / "tensors").write_bytes(b"tensors")
    write_manifest(
        Folder.at(directory), {"step": step}, {"tensors": fingerprint(directory / "tensors")}
    )
    return directory


def export(run: Path, step: int) -> None:
    (run / "final").mkdir()
    (run / "final" / "orpo_ray.json").write_text(json.dumps({"step": step}))


def let_pass(run: Path, seconds: float) -> None:
    """Make all that was written so far as old as this."""
    then = time.time() - seconds
    for path in run.rglob("*"):
        age = then - 60 if path.name == ".lock" else then  # claimed before the first line
        os.utime(path, (age, age))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(line | {"time": line["time"] - seconds}) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text)
    os.utime(run / "metrics.jsonl", (then, then))


def of_run(run: Path) -> RunStatus:
    status = read_status(run)
    assert isinstance(status, RunStatus)
    return status


def shown(directory: Path, as_json: bool = False) -> str:
    text = io.StringIO()
    show_status(directory, as_json, Console(file=text))
    return text.getvalue()


def driver_elsewhere(run: Path) -> None:
    (run / ".lock").write_text("process 7 on another-machine\n")
    os.utime(run / ".lock", (time.time() - 60,) * 2)  # it came before the first line


def test_a_run_that_trains(tmp_path):
    """30 steps are left, of 2 s each by the parts of the steps that were logged."""
    run = tmp_path / "first"
    with claimed(Folder.at(run)):
        write_run(run)
        status = of_run(run)
    assert (status.name, status.state) == ("first", "training")
    assert (status.step, status.n_steps, status.epoch) == (30, 60, 0.25)
    assert status.left_s == pytest.approx(60, abs=5)
    assert status.training == {
        "loss": 2.0,
        "accuracy": 0.75,
        "log_odds": 0.5,
        "pairs_per_s": 4.0,
        "tokens_per_s": 100.0,
    }
    assert status.driver is not None
    assert str(os.getpid()) in status.driver
    assert of_run(run).state == "stopped"


def test_the_last_evaluation_has_the_intervals_that_are_known(tmp_path):
    write_run(tmp_path)
    (evaluation,) = of_run(tmp_path).evaluations
    assert evaluation == {
        "set": "hard",
        "step": 20,
        "pairs": 40,
        "figures": {
            "accuracy": [0.75, 0.5, 0.875],
            "log_odds": [1.5],
            "loss": [3.0],
        },
    }
    assert "hard at step 20 on 40 pairs: accuracy 0.750 (0.500 to 0.875)" in shown(tmp_path)


def test_starting_is_before_the_first_line_and_after_a_driver_took_it_up_again(tmp_path):
    with claimed(Folder.at(tmp_path / "new")):
        assert of_run(tmp_path / "new").state == "starting"
    write_run(tmp_path / "old")
    with claimed(Folder.at(tmp_path / "old")):
        status = of_run(tmp_path / "old")
        assert (status.state, status.step, status.left_s) == ("starting", 30, None)


def test_a_live_driver_whose_run_is_silent_is_said(tmp_path):
    with claimed(Folder.at(tmp_path)):
        write_run(tmp_path)
        let_pass(tmp_path, LONG_AGO_S)
        status = of_run(tmp_path)
        assert status.state == "training"
        assert status.quiet_s == pytest.approx(LONG_AGO_S, abs=30)
        assert "nothing was written for 16 min" in shown(tmp_path)


def test_a_driver_on_another_machine_is_judged_by_what_it_wrote(tmp_path):
    write_run(tmp_path)
    driver_elsewhere(tmp_path)
    assert of_run(tmp_path).state == "training"
    let_pass(tmp_path, LONG_AGO_S)
    status = of_run(tmp_path)
    assert (status.state, status.driver) == ("unknown", "process 7 on another-machine")


def test_finished_is_the_model_of_the_last_step_and_not_of_a_shorter_run(tmp_path):
    write_run(tmp_path / "run", last_step=60)
    export(tmp_path / "run", 60)
    status = of_run(tmp_path / "run")
    assert (status.state, status.left_s) == ("finished", None)
    assert status.model == {"step": 60, "folder": str(tmp_path / "run" / "final")}
    write_run(tmp_path / "longer", last_step=30)
    export(tmp_path / "longer", 20)
    with claimed(Folder.at(tmp_path / "longer")):
        pass
    assert of_run(tmp_path / "longer").state == "stopped"
    write_run(tmp_path / "early", last_step=30, early_stopping_patience=1, eval_steps=10)
    export(tmp_path / "early", 20)
    assert of_run(tmp_path / "early").state == "finished"


def test_a_directory_of_prepared_data_was_not_started(tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(ORPOConfig(max_steps=7)))
    status = of_run(tmp_path)
    assert (status.state, status.step, status.n_steps) == ("not started", None, 7)
    assert status.checkpoint is None
    assert "step 0 of 7" in shown(tmp_path)


def test_the_newest_whole_checkpoint_and_what_is_wrong_with_newer_ones(tmp_path):
    write_run(tmp_path)
    for step in (10, 20):
        commit(tmp_path, step)
    os.utime(checkpoint_directory(tmp_path, 10) / "MANIFEST.json", (time.time() - 100,) * 2)
    (checkpoint_directory(tmp_path, 20) / "tensors").write_bytes(b"tens")
    checkpoint_directory(tmp_path, 30).mkdir()
    status = of_run(tmp_path)
    assert status.checkpoint is not None
    assert status.checkpoint["step"] == 10
    assert status.checkpoint["age_s"] == pytest.approx(100, abs=20)
    assert list(status.passed_over) == [
        {
            "step": 30,
            "reason": "it has no MANIFEST.json: it is being written, or its save was cut off",
        },
        {"step": 20, "reason": "tensors has 4 bytes instead of 7"},
    ]


def test_refused_rows_and_events_are_counted_and_the_last_one_is_told(tmp_path):
    files = write_run(tmp_path)
    files.event("resumed at step 20 of 60; 3 steps after it are done again", steps_redone=3)
    files.event("[red]step 21[/red]: row 7 left out", rows_skipped=1)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"time": 1, "te')
    status = of_run(tmp_path)
    assert status.data == {"train": DATA}
    assert status.events == {"steps_redone": 3, "rows_skipped": 1}
    text = shown(tmp_path)
    assert "train: 99 rows read, 96 kept, 0 held out, 3 refused (3 empty_chosen)" in text
    assert "rows_skipped 1, steps_redone 3 (events.jsonl); last" in text
    assert "ago: [red]step 21[/red]: row 7 left out" in text


def test_figures_that_were_not_finite_and_a_config_of_another_version_are_no_obstacle(tmp_path):
    files = write_run(tmp_path)
    files.metrics({"step": 40, "epoch": 1 / 3, "loss": float("nan")})
    (tmp_path / "config.yaml").write_text("train: {gone: 1}\n")
    assert of_run(tmp_path).n_steps is None
    assert "loss not finite" in shown(tmp_path)


def test_a_sweep_is_a_line_a_trial(tmp_path):
    trials = tmp_path / "trials"
    for name, last_step in (("a", 60), ("b", 30), ("c", 30), ("d", 20)):
        write_run(trials / name, last_step)
        record = {"trial": name, "values": {"beta": 0.25}}
        record |= {"failure": "out of memory"} if name == "c" else {}
        (trials / name / "trial.json").write_text(json.dumps(record))
    export(trials / "a", 60)
    let_pass(trials / "d", LONG_AGO_S)
    with claimed(Folder.at(tmp_path)):
        status = read_status(tmp_path)
        assert of_run(trials / "b").state == "training"
    assert isinstance(status, SweepStatus)
    assert status.is_alive
    states = {trial.name: trial.state for trial in status.trials}
    assert states == {"a": "finished", "b": "training", "c": "failed", "d": "stopped"}
    lines = shown(tmp_path).splitlines()
    assert [line.split()[0] for line in lines] == ["sweep", "driver", "trial", *"abcd"]
    assert "failed: out of memory" in lines[-2]
    assert "beta=0.25" in lines[-1]
    told = json.loads(shown(tmp_path, as_json=True))
    assert [trial["state"] for trial in told["trials"]] == [
        "finished",
        "stopped",
        "failed",
        "stopped",
    ]


def test_json_says_the_same(tmp_path):
    write_run(tmp_path)
    told = json.loads(shown(tmp_path, as_json=True))
    assert told["step"] == 30
    assert told["evaluations"][0]["figures"]["accuracy"] == [0.75, 0.5, 0.875]


def test_a_terminal_gets_it_folded_to_its_width_and_a_file_in_whole_lines(tmp_path):
    files = write_run(tmp_path)
    files.event("long " * 60, resumed=1)
    assert max(map(len, shown(tmp_path).splitlines())) > 300
    text = io.StringIO()
    show_status(tmp_path, False, Console(file=text, force_terminal=True, width=80))
    assert max(map(len, text.getvalue().splitlines())) <= 80


def test_asking_holds_up_no_driver(tmp_path):
    """A look takes the lock for an instant; a driver that comes in it tries again."""
    with claimed(Folder.at(tmp_path)):
        driver = last_driver(Folder.at(tmp_path))
        assert driver is not None
        assert driver.is_alive
        with pytest.raises(ConfigError, match="is in use by process"), claimed(Folder.at(tmp_path)):
            pass
    assert last_driver(Folder.at(tmp_path / "gone")) is None
    script = (
        "import fcntl, sys, time\n"
        "file = open(sys.argv[1])\n"
        "fcntl.flock(file, fcntl.LOCK_SH)\n"
        "print('held', flush=True)\n"
        "time.sleep(0.2)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as looker:
        assert looker.stdout is not None
        assert looker.stdout.readline() == "held\n"
        with claimed(Folder.at(tmp_path)):
            pass


def test_what_is_no_run_is_one_line_and_exit_2(run_here, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, reason in (("gone", "gone: no such folder"), ("empty", "not a run directory: it")):
        done = run_here(tmp_path, "jobs/status.py", name)
        assert done.returncode == 2
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")
        assert reason in line


def test_it_imports_neither_ray_nor_torch(tmp_path):
    write_run(tmp_path)
    code, modules = imported_by("jobs/status.py", str(tmp_path))
    assert code == 0
    assert not modules & {"torch", "ray", "transformers", "pyarrow", "matplotlib"}
