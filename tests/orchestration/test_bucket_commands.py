"""All commands with runs, pairs and models in a bucket, under Ray, with drivers that die."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from orpo_ray.runs.files import count_events
from orpo_ray.storage.folder import VIEWS, Folder
from tests.conftest import ROOT
from tests.orchestration.test_train import figures_of, wait_for, workers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SETTINGS = ["train_files=s3://bucket/pairs.jsonl", "max_steps=90", "save_steps=5"]
SETTINGS += ["logging_steps=5", "global_batch_size=4", "num_workers=2"]


@pytest.fixture(scope="module", autouse=True)
def pairs(bucket) -> None:
    row = {"prompt": "p {}", "chosen": "a {}", "rejected": "b {}"}
    rows = [{k: v.format(i) for k, v in row.items()} for i in range(100)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    bucket.put_object(Bucket="bucket", Key="pairs.jsonl", Body=text.encode())


def found(url: str) -> Path:
    """A run as someone finds it in the bucket."""
    return Folder.at(url, VIEWS).fetch_again().path


def has(bucket, prefix: str, part: str) -> bool:
    entries = bucket.list_objects_v2(Bucket="bucket", Prefix=prefix).get("Contents", ())
    return any(part in entry["Key"] for entry in entries)


def start(folder: Path, new_ray_cluster: str, scratch: Path, *settings: str) -> subprocess.Popen:
    """A driver on a machine of its own, as far as its disk is concerned."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs/train.py"), *settings],
        cwd=folder,
        env=os.environ | {"RAY_ADDRESS": new_ray_cluster, "ORPO_RAY_SCRATCH": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_run_outlives_its_driver_and_every_disk(bucket, new_ray_cluster, run_command, tmp_path):
    """SIGKILL, all copies deleted, the same command from elsewhere: the bytes of a run on disk."""
    whole = run_command(
        tmp_path, "jobs/train.py", *SETTINGS, "run_name=whole", ray_address=new_ray_cluster
    )
    assert whole.returncode == 0, whole.stderr
    settings = [*SETTINGS, "output_dir=s3://bucket/runs", "run_name=killed"]
    first = start(tmp_path, new_ray_cluster, tmp_path / "a", *settings)
    wait_for(first, lambda: has(bucket, "runs/killed/checkpoints/", "MANIFEST.json"))
    other = start(tmp_path, new_ray_cluster, tmp_path / "b", *settings)
    _, refusal = other.communicate(timeout=120)
    assert other.returncode == 2
    assert f"run_name: s3://bucket/runs/killed is in use by process {first.pid} on " in refusal
    first.kill()
    first.communicate()
    assert not psutil.wait_procs(workers(), timeout=60)[1]
    shutil.rmtree(tmp_path / "a")
    status = run_command(tmp_path, "jobs/status.py", "s3://bucket/runs/killed", "--json")
    assert status.returncode == 0, status.stderr
    assert json.loads(status.stdout)["directory"] == "s3://bucket/runs/killed"
    assert json.loads(status.stdout)["checkpoint"]["step"] >= 5

    second = start(tmp_path, new_ray_cluster, tmp_path / "b", *settings)
    told, errors = second.communicate(timeout=300)
    assert second.returncode == 0, errors
    run = found("s3://bucket/runs/killed")
    assert figures_of(run) == figures_of(tmp_path / "runs" / "whole")
    assert count_events(run)["resumed"] == 1
    assert "model: s3://bucket/runs/killed/final\n" in told
    assert str(tmp_path) not in told
    for name in ("report.html", "config.yaml", "data_report.json", "suspects.jsonl"):
        assert (run / name).stat().st_size
    assert (run / "final" / "README.md").stat().st_size
    status = run_command(tmp_path, "jobs/status.py", "s3://bucket/runs/killed", "--json")
    assert json.loads(status.stdout)["state"] == "finished"


def test_a_run_is_stopped_and_goes_on(bucket, new_ray_cluster, run_command, tmp_path):
    """SIGTERM to the driver reaches the workers through the bucket; nothing is done again."""
    settings = [*SETTINGS, "output_dir=s3://bucket/runs", "run_name=stopped", "save_steps=1000"]
    process = start(tmp_path, new_ray_cluster, tmp_path / "a", *settings, "max_steps=2000")
    wait_for(process, lambda: has(bucket, "runs/stopped/", "metrics.jsonl"))
    process.send_signal(signal.SIGTERM)
    told, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert "the same command with the same run_name goes on" in told
    step = max(line["step"] for line in lines(found("s3://bucket/runs/stopped")))
    done = run_command(
        tmp_path, "jobs/train.py", *settings, f"max_steps={step + 20}", ray_address=new_ray_cluster
    )
    assert done.returncode == 0, done.stderr
    events = count_events(found("s3://bucket/runs/stopped"))
    assert set(events) <= {"resumed"}
    assert not has(bucket, "runs/stopped/", "stop-requested")


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]


def test_a_sweep_its_champion_and_an_evaluation(bucket, new_ray_cluster, run_command, tmp_path):
    settings = ["eval_files=s3://bucket/pairs.jsonl", *SETTINGS, "output_dir=s3://bucket/runs"]
    done = run_command(
        tmp_path,
        "jobs/tune.py",
        *settings,
        "max_steps=8",
        "num_workers=1",
        "tune.num_samples=2",
        "tune.compare_beta_zero=false",
        "report_to=[tensorboard]",
        "run_name=sweep",
        timeout_s=600,
    )
    assert done.returncode == 0, done.stderr
    assert "champion: s3://bucket/runs/sweep/champion\n" in done.stdout
    sweep = found("s3://bucket/runs/sweep")
    assert {"results.csv", "results.parquet", "best_config.yaml", "sweep_report.html"} <= {
        path.name for path in sweep.iterdir()
    }
    weights = (sweep / "champion" / "model.safetensors").read_bytes()
    trials = [path.read_bytes() for path in sweep.glob("trials/*/final/model.safetensors")]
    assert weights in trials
    assert len({path.parts[-3] for path in sweep.glob("trials/*/tensorboard/events*")}) == 2
    assert len(list(sweep.glob("trials/*/report.html"))) == 2
    assert "scratch" not in (sweep / "best_config.yaml").read_text()
    status = run_command(tmp_path, "jobs/status.py", "s3://bucket/runs/sweep", "--json")
    assert [t["state"] for t in json.loads(status.stdout)["trials"]] == ["finished", "finished"]

    done = run_command(
        tmp_path,
        "jobs/evaluate.py",
        "s3://bucket/runs/sweep/best_config.yaml",
        "model_name_or_path=s3://bucket/runs/sweep/champion",
        "output_dir=s3://bucket/runs",
        "run_name=looked-at",
        ray_address=new_ray_cluster,
    )
    assert done.returncode == 0, done.stderr
    assert "evaluation: s3://bucket/runs/looked-at/evaluation.json\n" in done.stdout
    result = found("s3://bucket/runs/looked-at")
    assert json.loads((result / "evaluation.json").read_text())["sets"]["eval"]["pairs"] == 100
    assert (result / "scores.parquet").stat().st_size
    assert not (result / ".evaluation").exists()


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("output_dir=s3://nowhere/runs", "output_dir: s3://nowhere/runs cannot be used: "),
        ("output_dir=ftp://host/runs", "output_dir: give a path, s3://bucket/folder or gs://"),
        ("model_name_or_path=s3://bucket/none", "s3://bucket/none: no such folder"),
    ],
)
def test_a_place_that_is_none_is_refused(new_ray_cluster, run_command, tmp_path, setting, told):
    done = run_command(tmp_path, "jobs/train.py", *SETTINGS, setting, ray_address=new_ray_cluster)
    assert done.returncode == 2
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1
