"""Signals sent to real processes: every command, in every phase, and what is left of them."""

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
import pytest

from orpo_ray.orchestration.stopping import SignalInterrupt, kept_handlers, requests
from orpo_ray.training.errors import StoppedError
from tests.conftest import ROOT

INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
GOES_ON = "the same command with the same run_name goes on"
SETTINGS = (
    "train_files=pairs.jsonl",
    "max_length=64",
    "per_device_train_batch_size=4",
    "sample_prompts=0",
    "logging_steps=1",
    "run_name=run",
)
ENDLESS = ("max_steps=100000", "save_steps=100000")
EVALUATED = ("eval_files=pairs.jsonl", "eval_steps=3")


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
                (os.kill if number == TERM else os.killpg)(self.process.pid, number)

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


def handles_signals(command: Command) -> bool:
    status = Path(f"/proc/{command.process.pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (TERM - 1) & 1)


def has_ray(command: Command) -> bool:
    children = psutil.Process(command.process.pid).children()
    return any("raylet" in child.name() for child in children)


def starts_workers(command: Command) -> bool:
    return "starting 1 worker" in command.printed


def trains(command: Command) -> bool:
    return command.steps >= 2


def evaluates(command: Command) -> bool:
    return command.steps >= 3


def exports(command: Command) -> bool:
    return bool(list(command.run.glob("final*")))


def reports(command: Command) -> bool:
    return (command.run / "suspects.jsonl").exists()


def scores(command: Command) -> bool:
    return (command.run / ".evaluation").exists()


def a_trial_trains(command: Command) -> bool:
    ledgers = command.run.glob("trials/*/ledger.jsonl")
    return any(ledger.read_bytes().count(b"\n") >= 2 for ledger in ledgers)


SWEEP = (*EVALUATED, "num_samples=3", "max_concurrent_trials=1", "compare_beta_zero=false")
# Command, settings, phase, signals, exit code, and whether there are steps to keep.
TABLE = {
    "train-imports-int": ("train", (), handles_signals, [INT], 130, False),
    "train-ingest-term": ("train", (), has_ray, [TERM], 143, False),
    "train-start-int": ("train", ENDLESS, starts_workers, [INT], 130, False),
    "train-int": ("train", ENDLESS, trains, [INT], 130, True),
    "train-int-int": ("train", ENDLESS, trains, [INT, INT], 130, None),
    "train-int-4": ("train", ENDLESS, trains, [INT] * 4, 130, None),
    "train-term": ("train", ENDLESS, trains, [TERM], 143, True),
    "train-hup-hup": ("train", ENDLESS, trains, [HUP, HUP], 143, True),
    "train-evaluation-int": ("train", (*ENDLESS, *EVALUATED), evaluates, [INT], 130, True),
    "train-export-int": ("train", ("max_steps=4",), exports, [INT], 0, True),
    "train-report-term": ("train", ("max_steps=4",), reports, [TERM], 0, True),
    "tune-int": ("tune", (*SWEEP, *ENDLESS), a_trial_trains, [INT], 130, None),
    "tune-term": ("tune", (*SWEEP, *ENDLESS), a_trial_trains, [TERM], 143, None),
    "tune-int-int": ("tune", (*SWEEP, *ENDLESS), a_trial_trains, [INT, INT], 130, None),
    "evaluate-int": ("evaluate", EVALUATED, scores, [INT], 130, False),
    "evaluate-term": ("evaluate", EVALUATED, scores, [TERM], 143, False),
    "prepare-imports-term": ("prepare", (), handles_signals, [TERM], 143, False),
    "prepare-ingest-int": ("prepare", (), has_ray, [INT], 130, False),
}
NOT_SLOW = ("train-int", "prepare-imports-term")


@pytest.mark.commands
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "settings", "phase", "signals", "code", "keeps"),
    [
        pytest.param(*row, id=key, marks=() if key in NOT_SLOW else pytest.mark.slow)
        for key, row in TABLE.items()
    ],
)
def test_a_signal_ends_a_command_as_it_should(
    name, settings, phase, signals, code, keeps, tmp_path
):
    command = start(tmp_path, name, *settings)
    command.until(phase)
    command.send(signals)
    assert command.end() == code, command.printed
    printed = command.printed
    assert "Traceback" not in printed
    assert printed.count(GOES_ON) == (code != 0)
    if code == 130:
        assert f"interrupted; {GOES_ON}\n" in printed
    saved = list(command.run.glob("checkpoints/*/MANIFEST.json"))
    if keeps is not None:
        assert bool(saved) == keeps
    if code == 0:
        assert (command.run / "report.html").exists()
        assert (command.run / "final" / "README.md").exists()
    else:
        assert not list(command.run.glob("final"))
    if name == "tune":
        assert not (command.run / "champion").exists()
        assert not (command.run / "best_config.yaml").exists()
        assert "stopped early" not in printed
        if len(signals) == 1:
            assert "; not begun: samples 2 to 3\n" in printed
            assert list(command.run.glob("trials/*/checkpoints/*/MANIFEST.json"))


def test_a_second_ctrl_c_is_not_waited_for():
    """The first one makes a request; what it raised before is raised again by the next."""
    asked = []

    def ask() -> bool:
        asked.append(1)
        return True

    def interrupt_twice() -> None:
        with requests(ask):
            signal.raise_signal(INT)
            assert asked == [1]
            signal.raise_signal(TERM)  # what a terminal that is closed sends besides
            signal.raise_signal(INT)

    before = {number: signal.getsignal(number) for number in (INT, TERM, HUP)}
    with pytest.raises(SignalInterrupt) as caught:
        interrupt_twice()
    assert caught.value.exit_code == 130
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_run_that_ctrl_c_stopped_raises_keyboard_interrupt():
    def stop() -> None:
        with requests(lambda: True):
            signal.raise_signal(INT)
            raise StoppedError("stopped at step 3 of 9")

    with pytest.raises(KeyboardInterrupt, match="stopped at step 3 of 9"):
        stop()


def test_a_run_that_sigterm_stopped_raises_stopped_error():
    def stop() -> None:
        with requests(lambda: True):
            signal.raise_signal(TERM)
            raise StoppedError("stopped at step 3 of 9")

    with pytest.raises(StoppedError):
        stop()


def test_a_signal_that_came_too_late_goes_to_the_handler_of_before():
    with kept_handlers():
        got = []
        signal.signal(TERM, lambda number, frame: got.append(number))
        with requests(lambda: True):
            signal.raise_signal(TERM)
            assert got == []
        assert got == [TERM]


def test_handlers_are_given_back_after_an_error():
    def fail() -> None:
        with requests(lambda: True):
            assert signal.getsignal(TERM) is not before[TERM]
            raise ZeroDivisionError

    before = {number: signal.getsignal(number) for number in (INT, TERM, HUP)}
    with pytest.raises(ZeroDivisionError):
        fail()
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_hangup_that_nohup_ignores_stays_ignored():
    with kept_handlers():
        signal.signal(HUP, signal.SIG_IGN)
        with requests(lambda: True):
            assert signal.getsignal(HUP) is signal.SIG_IGN
