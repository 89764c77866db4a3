"""What a terminal shows of a run under way, and that nothing that is shown ends the watch."""

import io
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from orpo_ray.reports.live import Curve, LiveView, RunWatcher
from orpo_ray.reports.terminal import draws_in_place
from orpo_ray.runs.files import STOP, RunFiles
from orpo_ray.storage.folder import Folder

LINE = {
    "step": 120,
    "epoch": 1.0,
    "loss": 1.1953,
    "rewards/accuracies": 0.875,
    "log_odds_chosen": 0.6459,
    "learning_rate": 2.48e-3,
    "pairs_per_s": 133.4,
    "tokens_per_s": 5317.0,
}


PAIRED = ("rewards/accuracies", "log_odds_chosen")


class Terminal(io.StringIO):
    """Text that claims to go to a terminal."""

    def isatty(self) -> bool:
        """It does."""
        return True


class ClosedPipe(Terminal):
    """A terminal that is gone."""

    def write(self, text: str) -> int:
        """Fail as one does."""
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("width", [40, 80, 200])
def test_step_time_left_and_loss_are_shown_at_every_width(width: int) -> None:
    """What is cut is something else; nothing is wider than the terminal."""
    view = LiveView(750)
    view.add(LINE, left_s=754.0)
    view.add_evaluation("eval_", "evaluation at step 120: " + "accuracy 0.875  " * 12)
    text = Terminal()
    console = Console(file=text, width=width, color_system="standard", legacy_windows=False)
    console.print(view)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue()).splitlines()
    assert lines[0].startswith("step 120/750  0:12:34 left  loss 1.1")
    assert max(map(len, lines)) <= width
    assert [line.split()[0] for line in lines[2:]] == ["log", "accuracy", "evaluation"]
    assert ("5317 tokens/s" in lines[0]) == (width == 200)


def test_a_step_without_rejected_answers_has_no_metrics_of_two() -> None:
    """As of training on chosen answers alone."""
    line = {name: value for name, value in LINE.items() if name not in PAIRED}
    view = LiveView(750)
    view.add(line, left_s=1.0)
    text = Terminal()
    Console(file=text, width=200, color_system=None).print(view)
    assert "loss 1.1953  learning rate 2.48e-03  133.4 pairs/s" in text.getvalue()
    assert "accuracy" not in text.getvalue()


@pytest.mark.parametrize(
    ("environment", "draws"),
    [
        ({}, True),
        ({"TERM": "dumb"}, False),
        ({"NO_COLOR": "1"}, False),
        ({"CI": "true"}, False),
    ],
)
def test_a_view_is_drawn_where_it_can_be(
    environment: dict[str, str], draws: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "CI", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm"} | environment).items():
        monkeypatch.setenv(name, value)
    assert draws_in_place(Console(file=Terminal())) == draws


def test_a_file_is_no_terminal_whatever_forces_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = Console(file=io.StringIO())
    assert console.is_terminal
    assert not draws_in_place(console)


def test_trackers_get_every_line_when_the_terminal_is_gone(tmp_path: Path) -> None:
    """Rich makes an exit of a closed pipe, which would end the thread that feeds them."""
    logged: list[int] = []
    console = Console(file=ClosedPipe(), force_terminal=True, legacy_windows=False)
    logger = logging.getLogger("orpo_ray.reports.live")
    handler = logging.Handler()
    handler.emit = lambda record: console.print(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        files = RunFiles(Folder.at(tmp_path), is_writer=True)
        with RunWatcher(tmp_path, 750, console, log=lambda line: logged.append(line["step"])):
            for step in (10, 20, 30):
                files.notice(f"a notice at step {step}")
                files.metrics(LINE | {"step": step})
                wait_for(lambda step=step: logged[-1:] == [step])
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    assert logged == [10, 20, 30]


def test_a_request_to_stop_is_shown_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "orpo_ray")
    text = "stopping once a checkpoint of this step is saved; Ctrl-C ends at once"
    files = RunFiles(Folder.at(tmp_path), is_writer=True)
    with RunWatcher(tmp_path, 750):
        (tmp_path / STOP).touch()
        wait_for(lambda: text in caplog.text)
        files.notice("later")
        wait_for(lambda: "later" in caplog.text)
    assert caplog.text.count(text) == 1


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_curve_of_many_values_is_means_of_all(tmp_path: Path) -> None:
    """100,000 values are held as at most 2,000 means, whose mean is that of all."""
    curve = Curve()
    for value in range(1 << 17):
        curve.add(float(value))
        assert len(curve.values) < 2000
    assert curve.last == (1 << 17) - 1
    known = [value for value in curve.values if value is not None]
    assert known == sorted(known)
    assert len(known) > 900
    curve.add(None)
    assert curve.last is None


def test_the_metrics_of_a_run_are_read_once(tmp_path: Path) -> None:
    files = RunFiles(Folder.at(tmp_path), is_writer=True)
    seen: list[int] = []
    watcher = RunWatcher(tmp_path, 300, log=lambda line: seen.append(line["step"]))
    for step in range(1, 301):
        files.metrics(LINE | {"step": step})
        watcher._show_new()
    assert seen == [*range(1, 301)]
    assert watcher._metrics.n_bytes_read == (tmp_path / "metrics.jsonl").stat().st_size
