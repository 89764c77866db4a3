"""Files that are written whole or not at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orpo_ray.storage.files import (
    first_line,
    one_line,
    read_json,
    read_lines,
    replacing,
    write_atomic,
    write_json,
)


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a"
    write_atomic(path, "one\n")
    write_atomic(path, "zw\u00f6lf\n")
    assert path.read_bytes() == b"zw\xc3\xb6lf\n"
    write_atomic(path, b"\xff")
    assert path.read_bytes() == b"\xff"
    assert os.listdir(tmp_path) == ["a"]


def test_an_error_leaves_the_file_as_it_was(tmp_path):
    """And nothing beside it."""
    path = tmp_path / "a"
    write_atomic(path, "old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_killed_writer_leaves_the_file_as_it_was(tmp_path):
    """Its half of a file has the name of its process, and a suffix that no copy publishes."""
    path = tmp_path / "a.json"
    write_json(path, {"step": 1})
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from orpo_ray.storage.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('{')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)])
    assert process.wait(60) == -9
    assert read_json(path) == {"step": 1}
    (left,) = set(tmp_path.iterdir()) - {path}
    assert left.name.startswith(f"a.json.{process.pid}-")
    assert left.suffix == ".tmp"


def test_json_is_one_line_unless_it_is_indented(tmp_path):
    write_json(tmp_path / "a", {"b": [1, 2]})
    assert (tmp_path / "a").read_text() == '{"b": [1, 2]}\n'
    write_json(tmp_path / "a", {"b": [1]}, indent=1)
    assert (tmp_path / "a").read_text() == '{\n "b": [\n  1\n ]\n}\n'
    assert read_json(tmp_path / "missing") == {}
    (tmp_path / "a").write_text('{"b"')
    with pytest.raises(ValueError, match="Expecting"):
        read_json(tmp_path / "a")


def test_a_torn_last_line_is_no_line(tmp_path):
    path = tmp_path / "a"
    assert read_lines(path) == []
    path.write_text(f'{json.dumps({"step": 1})}\n{{"step": 2}}\n{{"st')
    assert read_lines(path) == [{"step": 1}, {"step": 2}]


def test_an_error_on_one_line():
    error = OSError("no such bucket:\n  nowhere\n")
    assert one_line(error) == "no such bucket: nowhere"
    assert first_line(error) == "no such bucket:"
    assert first_line(ValueError()) == ""


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path):
    """Each has a name of its own to write to."""
    path = tmp_path / "a"
    with replacing(path) as one:
        one.write_text("one")
        code = "import sys; from pathlib import Path\n"
        code += "from orpo_ray.storage.files import write_atomic\n"
        code += "write_atomic(Path(sys.argv[1]), 'two')\n"
        subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=60)
        assert path.read_text() == "two"
    assert path.read_text() == "one"
