"""A command in the background, in a process group of its own, as a terminal has it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.conftest import ROOT

SETTINGS = (
    "train_files=pairs.jsonl",
    "max_length=64",
    "per_device_train_batch_size=4",
    "sample_prompts=0",
    "logging_steps=1",
    "run_name=run",
)


@dataclass
class Command:
    """A command that runs in a folder, in a process group of its own.

    Args:
        folder: with its pairs; the run directory is below it.
        process: the command.
        began: processes that it was seen to start.
    """

    folder: Path
    process: subprocess.Popen[bytes]
    began: set[psutil.Process] = field(default_factory=set)

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.folder / "runs" / "run"

    @property
    def printed(self) -> str:
        """All that it has printed."""
        return (self.folder / "out").read_text()

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        ledger = self.run / "ledger.jsonl"
        return ledger.read_bytes().count(b"\n") if ledger.exists() else 0

    def until(self, condition: Callable[["Command"], object]) -> None:
        """Wait for a phase, and note the processes of that time."""
        deadline = time.monotonic() + 240
        while not condition(self):
            assert self.process.poll() is None, self.printed
            assert time.monotonic() < deadline, self.printed
            time.sleep(0.02)
        self.began |= set(psutil.Process(self.process.pid).children(recursive=True))

    def send(self, numbers: list[int]) -> None:
        """Send signals, each of a repeated one once the first is handled.

        SIGINT and SIGHUP reach the whole process group, as from a terminal; SIGTERM one process.
        """
        for i, number in enumerate(numbers):
            while i and self.process.poll() is None and not self.is_asked_to_stop:
                time.sleep(0.02)
            if self.process.poll() is None:
                (os.kill if number == signal.SIGTERM else os.killpg)(self.process.pid, number)

    @property
    def is_asked_to_stop(self) -> bool:
        """Whether the first signal was handled."""
        return bool(list(self.run.glob("**/stop-requested")))

    def end(self) -> int:
        """Wait for its end; returns its exit code."""
        code = self.process.wait(timeout=200)
        left = psutil.wait_procs(self.began, timeout=30)[1]
        assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]
        return code


def start(folder: Path, name: str, *settings: str) -> Command:
    row = {"prompt": "question {}", "chosen": "answer {} good", "rejected": "answer {} bad"}
    rows = [{key: text.format(i) for key, text in row.items()} for i in range(200)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with (folder / "out").open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *SETTINGS, *settings],
            cwd=folder,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Command(folder, process)
