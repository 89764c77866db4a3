"""Whole runs under Ray Train: real data, the Python API, resuming, workers that die."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_ray import ORPOConfig, ORPOTrainer
from orpo_ray.config import ConfigError
from orpo_ray.orchestration.cluster import set_aside_broken_snapshot, with_cluster
from tests.conftest import ROOT

PAIRS = {
    "prompt": ["hello", "how are you", "What is your name?", "What is your name?"],
    "chosen": ["hi, nice to meet you", "I am fine", "My name is Mary", "My name is Mary"],
    "rejected": ["leave me alone", "I am not fine", "Whats it to you?", "I dont have a name"],
}


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(ray_cluster, tmp_path_factory):
    """The documentation's dict of lists, trained from Python with an evaluation set."""
    folder = tmp_path_factory.mktemp("api")
    args = ORPOConfig(
        output_dir=str(folder),
        run_name="api",
        max_steps=12,
        global_batch_size=4,
        learning_rate=3e-3,
        logging_steps=4,
        save_steps=4,
    )
    trainer = ORPOTrainer(
        args=args, train_dataset=PAIRS, eval_dataset=datasets.Dataset.from_dict(PAIRS)
    )
    before = trainer.evaluate()
    trainer.train()
    return trainer, before


def test_the_documentations_pairs_are_learned(trained):
    """Four pairs, twelve steps: the model can only get better at what it sees each step."""
    trainer, before = trained
    result = trainer.result
    assert result.metrics["eval_loss"] < before["eval_loss"] - 1
    assert result.metrics_before["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-6)
    assert result.data_report["train"]["rows_read"] == 4
    assert result.data_report["train"]["rows_kept"] == 4
    assert [line["step"] for line in lines_of(Path(result.run_directory))] == [0, 4, 8, 12]


def test_evaluate_after_training_is_of_the_trained_model(trained):
    trainer, before = trained
    after = trainer.evaluate()
    assert after.keys() == before.keys()
    assert after["eval_loss"] == pytest.approx(trainer.result.metrics["eval_loss"], rel=1e-5)


def test_the_model_is_saved_as_transformers_loads_it(trained, tmp_path):
    trainer, _ = trained
    folder = trainer.save_model(str(tmp_path / "copy"))
    model, tokenizer = (
        part.from_pretrained(folder) for part in (AutoModelForCausalLM, AutoTokenizer)
    )
    ids = tokenizer("hello", return_tensors="pt")["input_ids"]
    generated = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert generated.shape[1] > ids.shape[1]
    card = (Path(folder) / "README.md").read_text()
    assert "4 rows read, 4 kept, 0 refused" in card
    assert "eval_rewards/accuracies" in card


def test_a_model_and_tokenizer_in_memory_are_taken(trained, ray_cluster, tmp_path):
    """The trained model goes in as objects; at a rate of 0 the same model comes out."""
    folder = trained[0].result.model_directory
    model = AutoModelForCausalLM.from_pretrained(folder)
    trainer = ORPOTrainer(
        model=model,
        args=ORPOConfig(output_dir=str(tmp_path), run_name="again", max_steps=1, learning_rate=0),
        train_dataset=PAIRS,
        eval_dataset={"first": PAIRS, "second": PAIRS},
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    result = trainer.train()
    assert result.metrics["eval_first_loss"] == result.metrics["eval_second_loss"]
    same = AutoModelForCausalLM.from_pretrained(trainer.save_model())
    for new, old in zip(same.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)


def test_more_workers_than_the_cluster_holds_are_refused(ray_cluster):
    config = ORPOConfig(num_workers=3, resources_per_worker={"CPU": 1})
    with pytest.raises(ConfigError, match="3 workers need 3 CPU, the cluster has 2"):
        with_cluster(config)


@pytest.mark.parametrize("content", ["", "{", '{"checkpoint_results": [{"checkpoint_dir_name": 1'])
def test_a_torn_snapshot_of_ray_is_set_aside(tmp_path, content):
    (tmp_path / "checkpoint_manager_snapshot.json").write_text(content)
    assert "torn" in set_aside_broken_snapshot(tmp_path)
    assert set_aside_broken_snapshot(tmp_path) is None


@pytest.mark.timeout(600)
def test_real_dialogues_train_on_two_workers(shared_data, run_command, ray_cluster, tmp_path):
    """The issue's command; 1,000 rows are read, and each is trained on or refused by name."""
    path = shared_data / "hh_rlhf_harmless.jsonl"
    done = run_command(
        tmp_path,
        "jobs/train.py",
        f"train_files={path}",
        "num_workers=2",
        "max_steps=20",
        "logging_steps=5",
        "run_name=hh",
        ray_address=ray_cluster,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    run = tmp_path / "runs" / "hh"
    report = json.loads((run / "data_report.json").read_text())["train"]
    assert report["rows_read"] == 1000
    assert report["rows_kept"] + sum(report["refused"].values()) == 1000
    refused = [json.loads(x) for x in (run / "quarantine" / "train.jsonl").read_text().splitlines()]
    assert len(refused) == report["rows_refused"]
    assert all(
        row["file"] == str(path.resolve()) and row["reason"] and row["row"] > 0 for row in refused
    )
    lines = lines_of(run)
    assert lines[-1]["step"] == 20
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert "step 20/20  loss " in done.stdout


@pytest.mark.timeout(600)
def test_a_killed_driver_goes_on_where_its_checkpoint_was(tmp_path):
    """SIGKILL after the first checkpoint; the same command ends as if nothing had been."""
    row = {"prompt": "p {}", "chosen": "a {}", "rejected": "b {}"}
    rows = [{k: v.format(i) for k, v in row.items()} for i in range(100)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    command = [sys.executable, str(ROOT / "jobs/train.py"), "train_files=pairs.jsonl"]
    command += ["max_steps=60", "save_steps=5", "logging_steps=5", "global_batch_size=4"]
    run = tmp_path / "runs" / "killed"
    process = subprocess.Popen(
        [*command, "run_name=killed"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while not list(run.glob("checkpoints/*/MANIFEST.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.2)
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in children if "RayTrainWorker" in child.name()]
    assert workers
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not psutil.wait_procs(workers, timeout=60)[1]
    for child in children:  # some of Ray's own daemons only notice after a minute
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    steps_before = [line["step"] for line in lines_of(run)]
    assert steps_before[-1] < 60
    done = subprocess.run(
        [*command, "run_name=killed"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "resumed at step " in (run / "run.log").read_text()
    steps = [line["step"] for line in lines_of(run)]
    assert steps == list(range(5, 61, 5))
