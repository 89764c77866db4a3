"""A file that grows is read once, whatever else happens to it."""

import json
from pathlib import Path

from orpo_ray.runs.files import NewLines


def add(path: Path, *steps: int) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps({"step": step}) + "\n" for step in steps)


def steps(lines: NewLines) -> list[int]:
    return [line["step"] for line in lines.read()[0]]


def test_every_byte_is_read_once(tmp_path: Path) -> None:
    """1,000 looks at a file that grows by a line each time."""
    path = tmp_path / "metrics.jsonl"
    lines = NewLines(path)
    assert lines.read() == ([], True)
    for step in range(1000):
        add(path, step)
        assert steps(lines) == [step]
    assert lines.n_bytes_read == path.stat().st_size


def test_a_torn_line_is_read_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = NewLines(path)
    path.write_text('{"step": 1}\n{"st')
    assert steps(lines) == [1]
    with path.open("a") as file:
        file.write('ep": 2}\n')
    assert steps(lines) == [2]


def test_a_file_that_was_cut_is_read_from_its_beginning(tmp_path: Path) -> None:
    """Where it is shorter, and where it has grown again to the middle of another line."""
    path = tmp_path / "metrics.jsonl"
    lines = NewLines(path)
    add(path, 1, 2, 3)
    assert lines.read()[1]
    path.write_text('{"step": 1}\n')
    assert lines.read() == ([{"step": 1}], True)
    add(path, 2, 3)
    assert lines.read() == ([{"step": 2}, {"step": 3}], False)
    path.write_text('{"step": 1}\n{"step": 100000000000000}\n')
    assert lines.read()[1]
