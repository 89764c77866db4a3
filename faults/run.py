"""One run of `jobs/train.py` on a cluster with faults: its inputs, its drivers, what it is at."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from faults.cluster import FaultCluster

ROOT = Path(__file__).resolve().parent.parent
N_PAIRS, BATCH, N_STEPS, SAVE_STEPS, EVAL_STEPS = 96, 4, 120, 15, 30
SETTINGS = {
    "train_files": "pairs.jsonl",
    "eval_files": "held_out.jsonl",
    "max_steps": N_STEPS,
    "save_steps": SAVE_STEPS,
    "eval_steps": EVAL_STEPS,
    "logging_steps": 5,
    "global_batch_size": BATCH,
    "num_workers": 2,
    "resources_per_worker": "{CPU: 1}",
    "health_check_timeout_s": 15,
    "max_failures": 5,
}


@dataclass
class Run:
    """One run of `jobs/train.py` on the cluster, perhaps by several drivers one after another.

    Args:
        cluster: it runs on.
        folder: with its inputs; the run directory is below it.
        settings: besides `SETTINGS`.
    """

    cluster: FaultCluster
    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    hurt_at: float = 0.0
    hurt_step: int = 0
    recovered_s: float | None = None
    driver: "subprocess.Popen[bytes] | None" = None
    n_starts: int = 0

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.folder / "runs" / "run"

    def start(self, **changes: Any) -> None:
        """Start a driver."""
        self.n_starts += 1
        settings = SETTINGS | self.settings | changes | {"run_name": "run"}
        command = [sys.executable, str(ROOT / "jobs/train.py")]
        self.driver = subprocess.Popen(
            [*command, *(f"{name}={value}" for name, value in settings.items())],
            cwd=self.folder,
            env=os.environ | {"RAY_ADDRESS": self.cluster.address},
            stdout=(self.folder / "out").open("ab"),
            stderr=subprocess.STDOUT,
        )

    def wait(self, timeout_s: float = 300) -> int:
        """Wait for the driver to end, minding when the step of the fault is passed."""
        assert self.driver is not None
        deadline = time.monotonic() + timeout_s
        while self.driver.poll() is None:
            self._mind_recovery()
            if time.monotonic() > deadline:
                self.driver.kill()
                self.driver.wait()
                return -1
            time.sleep(0.05)
        self._mind_recovery()
        return self.driver.returncode

    def _mind_recovery(self) -> None:
        passed = min(self.hurt_step + 1, N_STEPS)
        if self.hurt_at and self.recovered_s is None and self._step_since() >= passed:
            self.recovered_s = time.monotonic() - self.hurt_at

    def _step_since(self) -> int:
        """The newest step, but 0 until the run was seen to start again."""
        log = self.directory / "run.log"
        starts = log.read_text().count("attention:") if log.exists() else 0
        return self.step() if starts > self._starts else 0

    def hurt(self) -> None:
        """Note that the fault is now."""
        log = self.directory / "run.log"
        self._starts = log.read_text().count("attention:") if log.exists() else 0
        self.hurt_at, self.hurt_step = time.monotonic(), self.step()

    def step(self) -> int:
        """Steps in the ledger."""
        path = self.directory / "ledger.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def saved_steps(self) -> list[int]:
        """Steps of committed checkpoints."""
        manifests = self.directory.glob("checkpoints/step-*/MANIFEST.json")
        return [int(path.parent.name.removeprefix("step-")) for path in manifests]

    def until(self, condition: Callable[[], object], timeout_s: float = 240) -> None:
        """Wait for something to be true while the driver runs."""
        assert self.driver is not None
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self.driver.poll() is not None:
                raise RuntimeError(f"the driver ended early:\n{(self.folder / 'out').read_text()}")
            if time.monotonic() > deadline:
                raise RuntimeError("waited in vain")
            time.sleep(0.002)

    def until_step(self, step: int) -> None:
        """Wait for a step."""
        self.until(lambda: self.step() >= step)

    def processes(self, name: str) -> list[psutil.Process]:
        """Living processes of this cluster by a part of their title, oldest first."""
        found = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                title = " ".join(process.cmdline()) or process.name()
                if title.startswith("ray::") and name in title:
                    found.append(process)
        return sorted(found, key=lambda process: process.create_time())

    def kill_driver(self) -> None:
        """SIGKILL, and wait until its workers are gone."""
        assert self.driver is not None
        self.driver.kill()
        self.driver.wait()
        psutil.wait_procs(self.processes("RayTrainWorker"), timeout=60)


def write_inputs(folder: Path, long: bool) -> dict[str, Any]:
    """Pairs whose answers say the prompt's number or another one; returns settings for them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, first, count in (("pairs", 1, 6000 if long else N_PAIRS), ("held_out", 10**6, 12)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for i in range(first, first + count):
                row = {
                    "prompt": f"question {i}?",
                    "chosen": f"answer {i} " + "yes " * (i % 9),
                    "rejected": f"answer {i * 7} " + "no " * (i % 5),
                }
                file.write(json.dumps(row) + "\n")
    return {"shard_rows": 100} if long else {}
