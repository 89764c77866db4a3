"""Whole sweeps through `jobs/tune.py` on a Ray of their own."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from orpo_ray.config_file import load_config
from orpo_ray.orchestration.sweep_results import read_trials
from tests.conftest import ROOT
from tests.reference.models import tiny_model

COMMAND = [
    "jobs/tune.py",
    "train_files=train.jsonl",
    "eval_files=eval.jsonl",
    "num_samples=1",
    "trial_scheduler=none",
    "per_device_train_batch_size=4",
    "run_name=sweep",
]


def write_pairs(folder: Path) -> None:
    for name, n in (("train.jsonl", 64), ("eval.jsonl", 16)):
        rows = [{"prompt": f"p {i}", "chosen": f"a {i}", "rejected": f"b {i}"} for i in range(n)]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.timeout(600)
def test_a_bad_trial_is_recorded_and_the_best_of_the_others_is_kept(run_command, tmp_path):
    """Two points of a grid: the demo's own model, and a folder that holds no tokenizer."""
    write_pairs(tmp_path)
    tiny_model("llama", torch.float32).save_pretrained(tmp_path / "bare")
    good, bad = str(tmp_path / "runs" / "demo-42" / "base-model"), str(tmp_path / "bare")
    done = run_command(
        tmp_path,
        *COMMAND,
        "max_steps=12",
        "eval_steps=6",
        "search.beta=choice(0.7)",
        f"search.model_name_or_path=grid({good}, {bad})",
    )
    assert done.returncode == 0, done.stderr
    sweep = tmp_path / "runs" / "sweep"
    table = pq.read_table(sweep / "results.parquet").to_pylist()
    rows = {row["model_name_or_path"]: row for row in table}
    assert rows[good]["status"] == "finished"
    assert rows[good]["beta"] == 0.7
    assert rows[bad]["status"] == "failed"
    assert rows[bad]["failure"] in done.stdout
    AutoModelForCausalLM.from_pretrained(sweep / "champion")
    best = load_config(str(sweep / "best_config.yaml"), [])
    assert best.orpo.beta == 0.7
    assert best.model.model_name_or_path == good
    assert best.output.run_name is None
    names = {trial.name for trial in read_trials(sweep)}
    assert "beta-0" in names
    assert len(names) == 3
    page = (sweep / "sweep_report.html").read_text()
    assert page.count("<svg") >= 2
    assert not re.findall(r'(?:src|href)="http', page)  # but for SVG's own, `xlink:href="#..."`
    assert (sweep / "results.csv").read_text().count("\n") == 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_interrupted_sweep_goes_on(tmp_path):
    """SIGKILL once a trial is finished and another has a checkpoint; then the same command."""
    write_pairs(tmp_path)
    command = [sys.executable, str(ROOT / COMMAND[0]), *COMMAND[1:]]
    command += ["max_steps=300", "save_steps=20", "eval_steps=50", "compare_beta_zero=false"]
    command += ["search.beta=grid(0.1, 0.3, 1.0, 3.0)"]
    sweep = tmp_path / "runs" / "sweep"
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 400
    while not (
        list(sweep.glob("trials/*/final")) and len(list(sweep.glob("trials/*/checkpoints"))) > 2
    ):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.3)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    workers = [child for child in children if "RayTrainWorker" in child.name()]
    psutil.wait_procs(workers, timeout=60)
    before = {path: path.stat().st_mtime_ns for path in sweep.glob("trials/*/final/*.safetensors")}
    assert 1 <= len(before) < 4
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    trials = read_trials(sweep)
    assert len(trials) == 4
    assert all(trial.finished for trial in trials)
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in before.items())
    logs = [(trial.directory / "run.log").read_text() for trial in trials]
    assert any("resumed at step" in log for log in logs)
    for trial in trials:
        steps = [line["step"] for line in trial.lines]
        assert steps == sorted(set(steps))
