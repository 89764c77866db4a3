"""Trackers read back by their own readers: TensorBoard's files, a server of MLflow."""

import contextlib
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from orpo_ray.config.schema import ConfigError, ORPOConfig
from orpo_ray.orchestration.trackers import Trackers
from orpo_ray.reports.live import RunWatcher
from orpo_ray.runs.files import RunFiles
from orpo_ray.runs.metrics import TRAINING_SUMMARY
from orpo_ray.storage.folder import Folder

LINES = [
    {"step": step, "time": 1e9 + step, "loss": 3.0 - step / 10, "eval_rewards/accuracies": acc}
    for step, acc in ((0, 0.5), (10, 0.75), (20, math.nan))
]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("orpo_ray.")]


def log_some(name: str, run: Path, lines: list[dict]) -> None:
    """Log lines from another thread, as the watcher of a run does, and a document."""
    run.mkdir(exist_ok=True)
    config = ORPOConfig(report_to=[name], beta=0.25, run_name=run.name)
    with contextlib.closing(Trackers(config, run)) as trackers:
        thread = threading.Thread(target=lambda: [trackers.log(line) for line in lines])
        thread.start()
        thread.join()
        trackers.log_texts({"data_report.json": '{"rows": 7}'})


def test_tensorboard_has_every_metric_at_its_step_also_of_a_run_that_went_on(tmp_path, caplog):
    """The figure that is not finite is left out; the second driver adds to the same folder."""
    run = tmp_path / "run"
    log_some("tensorboard", run, LINES[:2])
    log_some("tensorboard", run, LINES[2:])
    assert warnings_of(caplog) == []
    read = EventAccumulator(str(run / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in read.Scalars("loss")]
    assert losses == [(0, 3.0), (10, 2.0), (20, 1.0)]
    accuracies = [(e.step, e.value) for e in read.Scalars("eval_rewards/accuracies")]
    assert accuracies == [(0, 0.5), (10, 0.75)]
    assert set(read.Tags()["scalars"]) == {"loss", "eval_rewards/accuracies"}
    (shown, *_) = read.Tensors("data_report.json/text_summary")
    assert b'{"rows": 7}' in shown.tensor_proto.string_val[0]
    assert "beta: 0.25\n" in next((run / "tensorboard").glob("*/hparams.yml")).read_text()


def test_tensorboard_has_every_line_once_after_a_driver_was_killed(tmp_path):
    """It was killed when step 20 was logged and not tracked, step 30 neither; 30 is done again."""
    run = tmp_path / "run"
    log_some("tensorboard", run, LINES[:2])
    lines = [*LINES, LINES[2] | {"step": 30}]
    write = "".join(json.dumps(line) + "\n" for line in lines).replace("NaN", "null")
    (run / "metrics.jsonl").write_text(write)
    config = ORPOConfig(report_to=["tensorboard"], run_name=run.name)
    trackers = Trackers(config, run)
    with contextlib.closing(trackers), RunWatcher(run, 40, log=trackers.log):
        files = RunFiles(Folder.at(run), is_writer=True)
        files.rewind(20)
        files.metrics(training_line(30, loss=5.0))
        files.metrics(training_line(40, loss=4.0))
    read = EventAccumulator(str(run / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in read.Scalars("loss")]
    assert losses == [(0, 3.0), (10, 2.0), (20, 1.0), (30, 5.0), (40, 4.0)]


def training_line(step: int, loss: float) -> dict[str, float]:
    """A line of a logged step that a watcher can show."""
    return {metric.name: 0.0 for metric in TRAINING_SUMMARY} | {"step": step, "loss": loss}


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[subprocess.Popen]:
    """A tracking server of MLflow on this machine, which is what the client is told to use."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    store = f"sqlite:///{tmp_path}/mlflow.db"
    places = ("--backend-store-uri", store, "--artifacts-destination", str(tmp_path / "artifacts"))
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command, *places],
            cwd=tmp_path,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    deadline = time.monotonic() + 90
    while True:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=2).close()
            break
        except OSError:
            assert time.monotonic() < deadline, (tmp_path / "server.log").read_text()
            time.sleep(0.2)
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


@pytest.mark.long
def test_mlflow_has_one_run_of_two_drivers_and_a_server_that_is_gone_is_given_up(
    server, tmp_path, caplog
):
    run = tmp_path / "run"
    log_some("mlflow", run, LINES[:2])
    log_some("mlflow", run, LINES[2:])
    assert warnings_of(caplog) == []
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("orpo_ray")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "run"
    assert found.data.params["beta"] == "0.25"
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(0, 3.0), (10, 2.0), (20, 1.0)]
    assert found.data.metrics.keys() == {"loss", "eval_rewards/accuracies"}
    artifacts = client.download_artifacts(found.info.run_id, "data_report.json", str(tmp_path))
    assert Path(artifacts).read_text() == '{"rows": 7}'

    def lose_the_server() -> None:
        config = ORPOConfig(report_to=["mlflow"])
        with contextlib.closing(Trackers(config, run)) as trackers:
            os.killpg(server.pid, 9)
            server.wait()
            for line in LINES:
                trackers.log(line)

    # In a thread, as MLflow would try to end the main thread's run when these tests end.
    thread = threading.Thread(target=lose_the_server)
    thread.start()
    thread.join()
    (warning,) = warnings_of(caplog)
    assert warning.startswith("report_to: mlflow is given up: ")


@pytest.mark.long
def test_a_tracker_that_cannot_be_reached_at_the_start_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="report_to: mlflow cannot be used: "):
        Trackers(ORPOConfig(report_to=["mlflow"]), tmp_path)


def test_a_tracker_that_is_not_installed_is_named_with_its_extra(tmp_path):
    with pytest.raises(ConfigError, match=r"report_to: wandb is not installed: pip install 'orpo"):
        Trackers(ORPOConfig(report_to=["wandb"]), tmp_path)
