"""Whole runs under Ray Train: real data, the Python API, resuming, workers that die."""

import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import datasets
import psutil
import pytest
import ray.train
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_ray import ORPOConfig, ORPOTrainer, StoppedError, prepare
from orpo_ray.cli import main
from orpo_ray.config.schema import ConfigError
from orpo_ray.orchestration.cluster.connection import with_cluster, workers_that_fit
from orpo_ray.runs.files import count_events
from tests.conftest import ROOT
from tests.reference.timing import TIMING

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
        report_to=["tensorboard"],
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
    rows = "4 rows read, 4 kept (4 trained, 0 not reached), 0 held out, 0 refused"
    assert f"- train: {rows}; 0 pairs truncated" in card
    assert "| evaluation | 4 | " in card


def ray_result(run: Path) -> ray.train.Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray reads its file by an old function of pydantic
        return ray.train.Result.from_path(str(run))


def test_ray_has_the_model_as_the_checkpoint_of_its_result(trained):
    """Once, at the end, where the model lies already."""
    run = Path(trained[0].result.run_directory)
    result = ray_result(run)
    assert Path(result.checkpoint.path).samefile(run / "final")
    assert len(result.best_checkpoints) == 1
    assert result.metrics["eval_loss"] == pytest.approx(trained[0].result.metrics["eval_loss"])
    assert result.metrics["step"] == 12


@pytest.mark.slow
def test_a_longer_run_begins_although_rays_list_of_checkpoints_is_torn(trained, tmp_path):
    """Ray Train refuses to start on it; the manifests of the checkpoints are enough."""
    run = tmp_path / "api"
    shutil.copytree(trained[0].result.run_directory, run)
    (listed,) = run.glob("checkpoint_manager_snapshot.json")
    listed.write_text(listed.read_text()[:40])
    args = trained[0].args.replace(output_dir=str(tmp_path), max_steps=14, report_to=[])
    assert ORPOTrainer(args=args, train_dataset=PAIRS).train().metrics["step"] == 14
    assert ray_result(run).metrics["step"] == 14


def test_a_run_leaves_what_there_is_to_look_at(trained):
    """Every chart but the router loss and MFU has points; four rows, each seen in twelve steps."""
    result = trained[0].result
    figure = result.plot()
    titles = [axis.get_title() for axis in figure.axes if axis.lines]
    assert len(titles) == 9
    assert figure._repr_png_().startswith(b"\x89PNG")  # what a notebook shows
    run = Path(result.run_directory)
    suspects = [json.loads(line) for line in (run / "suspects.jsonl").read_text().splitlines()]
    assert sorted((line["row"], line["passes"]) for line in suspects) == [
        (n, 12) for n in range(1, 5)
    ]
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert {line["step"] for line in samples} == {0, 12}
    logged = EventAccumulator(str(run / "tensorboard")).Reload()
    last = {name: logged.Scalars(name)[-1] for name in logged.Tags()["scalars"]}
    assert {name for name in lines_of(run)[-1] if name not in ("step", "time")} == {*last}
    assert last["loss"].step == 12
    assert last["loss"].value == pytest.approx(result.metrics["loss"], rel=1e-6)
    assert {"config.yaml/text_summary", "README.md/text_summary"} <= {*logged.Tags()["tensors"]}
    page = (run / "report.html").read_text()
    assert "What is your name?" in page
    assert "look labelled the wrong way round" not in page or suspects[0]["margin_mean"] < 0


@pytest.mark.slow
def test_a_model_and_tokenizer_in_memory_are_taken(trained, ray_cluster, tmp_path, capfd, caplog):
    """The trained model goes in as objects; at a rate of 0 the same model comes out.

    Metrics are printed, as TRL does; what else there is to know is logged, to whoever listens.
    """
    caplog.set_level(logging.INFO, "orpo_ray")
    folder = trained[0].result.model_directory
    model = AutoModelForCausalLM.from_pretrained(folder)
    trainer = ORPOTrainer(
        model=model,
        args=ORPOConfig(output_dir=str(tmp_path), run_name="again", max_steps=1, learning_rate=0),
        train_dataset=PAIRS,
        eval_dataset={"first": PAIRS, "second": PAIRS},
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    capfd.readouterr()
    result = trainer.train()
    printed, errors = capfd.readouterr()
    assert printed
    assert all(line.startswith("{'") for line in printed.splitlines())
    assert errors == ""
    logged = [r.getMessage() for r in caplog.records if r.name.startswith("orpo_ray.")]
    counts = "train data: 4 rows read, 4 kept, 0 held out, 0 refused; "
    assert counts + "texts (prompt, chosen, rejected)" in logged
    assert any(line.startswith("evaluation of first at step 0: accuracy ") for line in logged)
    assert any(line.startswith("step 1/1  loss ") for line in logged)
    assert result.metrics["eval_first_loss"] == result.metrics["eval_second_loss"]
    same = AutoModelForCausalLM.from_pretrained(trainer.save_model())
    for new, old in zip(same.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)


def test_the_command_prints_what_the_function_logs(ray_cluster, tmp_path, capfd):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n' * 3)
    settings = {"train_files": f"{tmp_path}/pairs.jsonl", "output_dir": f"{tmp_path}/runs"}
    report = prepare(ORPOConfig(**settings, run_name="python"))
    assert report["train"]["rows_kept"] == 3
    assert capfd.readouterr() == ("", "")
    assert main(["prepare", *(f"{k}={v}" for k, v in settings.items()), "run_name=shell"]) == 0
    first, *_, last = capfd.readouterr().out.splitlines()
    assert first == (
        "train data: 3 rows read, 3 kept, 0 held out, 0 refused; texts (prompt, chosen, rejected)"
    )
    run = tmp_path / "runs" / "shell"
    assert last == f"data report: {run}/data_report.html and {run}/data_report.json"
    assert not logging.getLogger("orpo_ray").isEnabledFor(logging.INFO)


@pytest.mark.slow
@pytest.mark.commands
def test_sigterm_raises_out_of_train_once_a_checkpoint_is_saved(ray_cluster, tmp_path):
    config = ORPOConfig(
        output_dir=str(tmp_path),
        run_name="stopped",
        max_steps=10_000,
        logging_steps=1,
        sample_prompts=0,
    )
    run = tmp_path / "stopped"

    def stop_soon() -> None:
        while not (run / "metrics.jsonl").exists() or lines_of(run)[-1]["step"] < 2:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=stop_soon, daemon=True)
    thread.start()
    with pytest.raises(StoppedError, match=r"stopped at step \d+ of 10000"):
        ORPOTrainer(args=config, train_dataset=PAIRS).train()
    thread.join()
    assert list(run.glob("checkpoints/step-*/MANIFEST.json"))
    assert signal.getsignal(signal.SIGTERM) is before


def test_more_workers_than_the_cluster_holds_are_refused(ray_cluster):
    """After the wait that was asked for, with what every node has."""
    config = ORPOConfig(num_workers=3, resources_per_worker={"CPU": 1}, cluster_wait_s=1.5)
    message = "3 workers need 1 CPU each, the cluster holds 2 after 1.5 s; its nodes have: 2 CPU"
    started = time.monotonic()
    with pytest.raises(ConfigError, match=message):
        with_cluster(config)
    assert time.monotonic() - started >= 1.5


@pytest.mark.parametrize(
    ("changes", "n_fit"),
    [
        ({"resources_per_worker": {"CPU": 2}}, 1),
        ({"resources_per_worker": {"CPU": 1 / 3}}, 6),
        ({"resources_per_worker": {"CPU": 1}, "placement_strategy": "STRICT_SPREAD"}, 1),
        ({"resources_per_worker": {"CPU": 1}, "placement_strategy": "STRICT_PACK"}, 2),
        ({"resources_per_worker": {"CPU": 1}, "accelerator_type": "H100"}, 0),
        ({"resources_per_worker": {"CPU": 1, "GPU": 0}}, 2),
    ],
)
def test_workers_are_counted_whole_on_a_node(ray_cluster, changes, n_fit):
    assert workers_that_fit(ORPOConfig(**changes)) == n_fit


@pytest.mark.slow  # test_refusals trains a mixture of the same files on two workers
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


def wait_for(process: subprocess.Popen, condition: Callable[[], object]) -> None:
    """Wait until something is true of a run that goes on."""
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)


def workers() -> list[psutil.Process]:
    """Training workers of the cluster that these tests started, oldest first."""
    children = psutil.Process().children(recursive=True)
    found = [p for p in children if p.is_running() and "RayTrainWorker" in p.name()]
    return sorted(found, key=lambda process: process.create_time())


def figures_of(run: Path) -> tuple[str, list[dict], list[str]]:
    """What has to be the same: the weights, the metrics without times, the ledger."""
    digest = hashlib.sha256((run / "final" / "model.safetensors").read_bytes()).hexdigest()
    lines = [{k: v for k, v in line.items() if k not in TIMING} for line in lines_of(run)]
    return digest, lines, (run / "ledger.jsonl").read_text().splitlines()


@pytest.mark.commands
@pytest.mark.timeout(900)
def test_a_run_that_loses_a_worker_and_its_driver_ends_byte_identical(
    ray_cluster, run_command, tmp_path
):
    """SIGKILL for a worker, for its successor's driver, and what others try in between."""
    row = {"prompt": "p {}", "chosen": "a {}", "rejected": "b {}"}
    rows = [{k: v.format(i) for k, v in row.items()} for i in range(100)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = ["train_files=pairs.jsonl", "max_steps=90", "save_steps=5", "logging_steps=5"]
    settings += ["global_batch_size=4", "num_workers=2"]
    whole = run_command(
        tmp_path, "jobs/train.py", *settings, "run_name=whole", ray_address=ray_cluster
    )
    assert whole.returncode == 0, whole.stderr
    assert "on the way" not in whole.stdout
    run, settings = tmp_path / "runs" / "killed", [*settings, "run_name=killed"]
    log = run / "run.log"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "jobs/train.py"), *settings],
        cwd=tmp_path,
        env=os.environ | {"RAY_ADDRESS": ray_cluster},
        stdout=subprocess.DEVNULL,
    )
    wait_for(process, lambda: list(run.glob("checkpoints/*/MANIFEST.json")))
    workers()[-1].kill()
    second = run_command(tmp_path, "jobs/train.py", *settings, ray_address=ray_cluster)
    assert second.returncode == 2
    assert f"in use by process {process.pid} on " in second.stderr
    wait_for(process, lambda: "resumed at step" in log.read_text())
    process.kill()
    process.wait()
    assert not psutil.wait_procs(workers(), timeout=60)[1]
    other = run_command(tmp_path, "jobs/train.py", *settings, "beta=0.4", ray_address=ray_cluster)
    assert other.returncode == 2
    assert "error: beta: 3.0 in the checkpoint, 0.4 now\n" in other.stderr
    done = run_command(tmp_path, "jobs/train.py", *settings, ray_address=ray_cluster)
    assert done.returncode == 0, done.stderr
    assert figures_of(run) == figures_of(tmp_path / "runs" / "whole")
    assert count_events(run)["resumed"] == 2
    assert "events: " in done.stdout
    assert "resumed 2" in done.stdout
