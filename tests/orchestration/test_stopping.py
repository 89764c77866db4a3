"""Signals sent to real processes: every command, in every phase, and what is left of them."""

import signal
from pathlib import Path

import psutil
import pytest

from orpo_ray.orchestration.stopping import SignalInterrupt, kept_handlers, requests
from orpo_ray.training.errors import StoppedError
from tests.background import Command, start

INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
GOES_ON = "the same command with the same run_name goes on"
ENDLESS = ("max_steps=100000", "save_steps=100000")
EVALUATED = ("eval_files=pairs.jsonl", "eval_steps=3")


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
NOT_SLOW = ("prepare-imports-term",)


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
