"""Whether a run that was killed and resumed ends with the bytes of one that was not."""

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.pretrained import ModelSource
from orpo_ray.runs.files import read_metrics
from orpo_ray.training.job import TrainingJob
from orpo_ray.training.loop import run_training
from rank import folder_of, start_rank, stream, unshuffled
from results import DEVICE, DRY, print_machine, record
from tests.reference.timing import TIMING

BATCH = 4 if DRY else 16
KILL_AT, EXIT_CODE = 10, 9
# Two of each, so that a difference without `full_determinism` is seen.
RUNS = ("whole", "killed") if DRY else ("whole", "again", "killed", "free", "free again")


def main() -> None:
    """Start the runs beside one another, resume the killed one, and compare."""
    print_machine()
    folder = folder_of("5m", name="-resume")
    runs = {name: tempfile.mkdtemp(prefix="run-") for name in RUNS}

    def start(name: str, kill_at: int) -> "subprocess.Popen[bytes]":
        deterministic = "no" if name.startswith("free") else "yes"
        command = [sys.executable, __file__, str(folder), runs[name], deterministic, str(kill_at)]
        return subprocess.Popen(command)

    processes = {name: start(name, KILL_AT if name == "killed" else -1) for name in RUNS}
    codes = {name: process.wait() for name, process in processes.items()}
    codes["resumed"] = start("killed", -1).wait()
    expected = {name: EXIT_CODE if name == "killed" else 0 for name in codes}
    record("resume", exit_codes=codes, expected=codes == expected)
    digests = {name: _digest(Path(runs[name])) for name in RUNS}
    lines = {name: _metrics(Path(runs[name])) for name in RUNS}
    log = Path(runs["killed"], "run.log").read_text()
    equal = digests["killed"] == digests["whole"] and lines["killed"] == lines["whole"]
    record(
        "resume",
        resumed="resumed at step" in log,
        weights_equal=digests["killed"] == digests["whole"],
        metrics_equal=lines["killed"] == lines["whole"],
        twice_equal=None if DRY else digests["again"] == digests["whole"],
        twice_equal_without_determinism=None if DRY else digests["free"] == digests["free again"],
        attention=[line for line in log.splitlines() if "attention:" in line][:1],
    )
    sys.exit(0 if equal and codes == expected else 1)


def run(folder: str, directory: str, deterministic: str, kill_at: str) -> None:
    """12 steps with evaluations, samples and checkpoints; may end abruptly at a step."""
    start_rank()
    torch.set_num_threads(1)
    config = ORPOConfig(
        max_steps=12,
        save_steps=4,
        logging_steps=1,
        eval_steps=6,
        learning_rate=1e-3,
        global_batch_size=BATCH,
        full_determinism=deterministic == "yes",
        sample_prompts=2,
        max_new_tokens=4,
    )
    feed = stream(Path(folder), BATCH, shuffle=True)

    def watch(line: Mapping[str, Any]) -> None:
        if line["step"] == int(kill_at):
            time.sleep(2)  # for the checkpoint of step 8
            os._exit(EXIT_CODE)

    source = ModelSource(f"{folder}/model", f"{folder}/model")
    evals = {"eval_": unshuffled(feed)}
    job = TrainingJob(config, source, directory, feed, evals, DEVICE, lambda metrics: None, watch)
    run_training(job)
    dist.destroy_process_group()


def _digest(directory: Path) -> str | None:
    path = directory / "final" / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def _metrics(directory: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMING} for line in read_metrics(directory)]


if __name__ == "__main__":
    run(*sys.argv[1:]) if len(sys.argv) > 1 else main()
