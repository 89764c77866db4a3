"""Resident memory of a CPU worker step by step, under several settings of its allocator.

`python benchmarks/resident.py --model 50m --steps 40` runs this project's step with each of the
settings in turn, a process each, and prints resident memory after the steps 4, 8, 20 and the last,
their peak, and seconds of CPU time a step (page faults are part of it; other programs are not).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from orpo_ray.training.allocator import memory_settings
from workload import SIZES, VOCABULARIES, Work, make_folder

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "hh_rlhf_harmless.jsonl"
MIB = 2**20
OURS = memory_settings(use_gpu=False)
CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
SETTINGS = {
    "the project's": OURS,
    "with kernels of 1,024 shapes": {k: v for k, v in OURS.items() if k not in CACHES},
    "mmap above 32 MiB, trim 256 MiB": OURS
    | {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**28)},
    "mmap above 128 MiB, trim 512 MiB": OURS
    | {"MALLOC_MMAP_THRESHOLD_": str(2**27), "MALLOC_TRIM_THRESHOLD_": str(2**29)},
    "nothing set": {},
}


class _Line:
    """What a side talks to: keeps the memory and the CPU time of every step."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []

    def recv(self) -> None:
        """Begin a step."""

    def send(self, message: Any) -> None:
        """A step ended, or its peak is told."""
        if isinstance(message, dict):
            resident = psutil.Process().memory_info().rss / 2**30
            self.steps.append((resident, time.process_time()))


def run(work: Work) -> None:
    """Take the steps in this process, and print what they took."""
    from sides import orpo_ray_side, peak_memory_bytes

    line = _Line()
    orpo_ray_side(work, line)  # type: ignore[arg-type]
    print(json.dumps({"steps": line.steps, "peak": peak_memory_bytes("cpu") / 2**30}))


def main() -> None:
    """Run every setting, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SIZES, default="50m")
    parser.add_argument("--data", default=str(DATA), help="a file of pairs")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=1, help="runs of every setting, in turn")
    parser.add_argument("--vocabulary", choices=VOCABULARIES, default="16k")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--microbatch", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--pairs", type=int, default=8, help="a step")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        run(Work(**json.loads(options.work)))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Work(
            model=options.model,
            vocabulary=options.vocabulary,
            batch=options.pairs,
            steps=1,
            rounds=options.steps - 1,
            device="cpu",
            folder=folder,
            budget_tokens=options.microbatch,
            bf16=options.bf16,
        )
        make_folder(Path(folder), options.data, work.model, work.vocabulary, work.n_pairs)
        for _ in range(options.rounds):
            for name, settings in SETTINGS.items():
                environment = {k: v for k, v in os.environ.items() if k not in OURS} | settings
                command = [sys.executable, __file__, "--work", json.dumps(vars(work))]
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(done.stderr[-2000:])
                answer = json.loads(done.stdout.splitlines()[-1])
                steps = answer["steps"]
                shown = {n: f"{steps[n - 1][0]:.2f}" for n in (4, 8, 20, len(steps))}
                cpu_s = (steps[-1][1] - steps[3][1]) / (len(steps) - 4)
                print(f"{name}: GiB after step {shown}, peak {answer['peak']:.2f}; ", end="")
                print(f"{cpu_s:.3f} CPU s a step", flush=True)


if __name__ == "__main__":
    main()
