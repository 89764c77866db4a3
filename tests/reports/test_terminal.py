"""Output that goes nowhere: closed pipes, full disks, and encodings that lack characters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orpo_ray.reports.terminal import Output, unfailing_output
from tests.conftest import ROOT

PRINTS = """
import sys
from orpo_ray.reports.terminal import unfailing_output

with unfailing_output():
    for i in range(2000):
        print(f"line {i}")
        print(f"error {i}", file=sys.stderr)
    open(sys.argv[1], "w").write("done")
sys.exit(7)
"""


def exit_code_of(shell: str, folder: Path) -> int:
    """Of the program that prints, as `$PROGRAM` in a command of a shell."""
    (folder / "prints.py").write_text(PRINTS)
    program = f"{sys.executable} {folder / 'prints.py'} {folder / 'done'}"
    done = subprocess.run(
        ["bash", "-c", shell.replace("$PROGRAM", program)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert (folder / "done").read_text() == "done"
    return done.returncode


@pytest.mark.parametrize(
    "shell",
    [
        "$PROGRAM 2>&1 | head -1; exit ${PIPESTATUS[0]}",
        "$PROGRAM > /dev/full 2>&1",
        "$PROGRAM >&- 2>&-",
        "$PROGRAM | true; exit ${PIPESTATUS[0]}",
    ],
)
def test_the_exit_code_is_that_of_the_run(shell: str, tmp_path: Path) -> None:
    assert exit_code_of(shell, tmp_path) == 7


def test_what_an_encoding_lacks_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with path.open("w", encoding="ascii") as file:
        Output(file).write("it\u2019s 5 \u20ac \udc80\n")
    assert path.read_bytes() == b"it?s 5 ? ?\n"


def test_output_is_written_again_once_there_is_room(tmp_path: Path) -> None:
    """A pipe that is full, then emptied; where it cannot be written to, text is left out."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with open(writer, "w", encoding="utf-8") as file, open(reader, "rb") as read:
        output = Output(file)
        for _ in range(100):
            output.write("x" * 65536)
        full = read.read1(1 << 24)
        output.write("again\n")
        assert read.read1(1 << 24).endswith(b"again\n")
    assert set(full) == set(b"x")


def test_streams_are_given_back() -> None:
    before = sys.stdout, sys.stderr
    with unfailing_output():
        pass
    assert (sys.stdout, sys.stderr) == before
