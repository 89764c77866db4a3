"""Finding, cutting and reading files of pairs."""

import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_ray.preference.errors import DataError
from orpo_ray.preference.records import Reason
from orpo_ray.preference.sources import RawRow, Split, find_files, read_split, split_file

BOM = b"\xef\xbb\xbf"
# A line separator, an escaped line end and letters of several bytes: none of them ends a line.
ROWS: list[dict[str, Any]] = [
    {"prompt": f"p{i}\u2028", "chosen": "yes\n\u00e9\U0001f600", "rejected": ["no"] * (i % 3)}
    for i in range(7)
]


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2)


WRITERS: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": lambda path: path.write_bytes(as_lines(ROWS)),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(as_lines(ROWS))),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS)),
    "rows.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "rows.parquet": write_parquet,
}


def read_all(path: Path, rows_per_split: int) -> list[RawRow]:
    splits = split_file(str(path), rows_per_split)
    return [raw for split in splits for raw in read_split(split)]


def read_bytes(path: Path, content: bytes, rows_per_split: int = 100) -> list[RawRow]:
    path.write_bytes(content)
    return read_all(path, rows_per_split)


@pytest.mark.parametrize("rows_per_split", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str, rows_per_split: int) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    rows = read_all(path, rows_per_split)
    assert [raw.record for raw in rows] == ROWS
    assert [raw.number for raw in rows] == list(range(7))
    assert {raw.problem for raw in rows} == {None}


@pytest.mark.parametrize(
    ("name", "n_splits"),
    [("rows.jsonl", 3), ("rows.parquet", 3), ("rows.jsonl.gz", 1), ("rows.json", 1)],
)
def test_files_that_can_be_entered_anywhere_are_cut(
    tmp_path: Path, name: str, n_splits: int
) -> None:
    """7 rows by 3 are splits of 3, 3 and 1."""
    WRITERS[name](tmp_path / name)
    splits = split_file(str(tmp_path / name), 3)
    assert len(splits) == n_splits
    assert [split.first_row for split in splits] == [0, 3, 6][:n_splits]


@pytest.mark.parametrize("name", ["odd.jsonl", "odd.jsonl.gz"])
@pytest.mark.parametrize("rows_per_split", range(1, 7))
def test_marks_blank_lines_and_line_ends(tmp_path: Path, name: str, rows_per_split: int) -> None:
    """A byte order mark, CRLF, two blank lines, no line end at the end: lines 0, 2 and 4 remain."""
    content = BOM + b'{"a": 0}\r\n\r\n{"a": 1}\n \t \n{"a": 2}'
    packed = gzip.compress(content) if name.endswith(".gz") else content
    rows = read_bytes(tmp_path / name, packed, rows_per_split)
    assert [(raw.number, raw.record) for raw in rows] == [
        (0, {"a": 0}),
        (2, {"a": 1}),
        (4, {"a": 2}),
    ]


def test_a_mark_before_a_blank_line_is_no_row(tmp_path: Path) -> None:
    rows = read_bytes(tmp_path / "rows.jsonl", BOM + b'\r\n{"a": 1}\r\n')
    assert [(raw.number, raw.record) for raw in rows] == [(1, {"a": 1})]


LINES = [b'{"a": 1}', b'{"a": "\\n"}', b"", b"  ", b"\r", b"{nope", b"[1]", b'{"a": 2}\r', b"\xff"]


@settings(deadline=None)
@given(lines=st.lists(st.sampled_from(LINES), min_size=1), rows_per_split=st.integers(1, 5))
def test_any_cut_gives_the_rows_of_the_whole(lines: list[bytes], rows_per_split: int) -> None:
    content = b"\n".join(lines)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        rows = read_bytes(path, content, rows_per_split)
        assert rows == list(read_split(Split(str(path))))
    expected = [number for number, line in enumerate(lines) if line.strip()]
    assert [raw.number for raw in rows] == expected
    bad = {b"{nope": Reason.MALFORMED_JSON, b"\xff": Reason.MALFORMED_JSON}
    bad[b"[1]"] = Reason.NOT_AN_OBJECT
    assert [raw.problem for raw in rows] == [bad.get(lines[number]) for number in expected]


def test_lines_longer_than_a_block_are_cut_where_they_end(tmp_path: Path) -> None:
    """Blocks of 1 MiB are searched for line ends; these lines lie across one to three blocks."""
    rows = [{"a": "x" * length} for length in (3 << 20, 5, (1 << 20) - 11, (1 << 20) + 7, 900_000)]
    assert [raw.record for raw in read_bytes(tmp_path / "long.jsonl", as_lines(rows), 2)] == rows
    assert len(split_file(str(tmp_path / "long.jsonl"), 2)) == 3


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "cut off', Reason.MALFORMED_JSON),
        (b'{"a": 1} {"a": 2}', Reason.MALFORMED_JSON),
        (b'{"a": "\xff"}', Reason.MALFORMED_JSON),
        (b"[" * 100_000, Reason.MALFORMED_JSON),
        (b'["a", "b"]', Reason.NOT_AN_OBJECT),
        (b'"text"', Reason.NOT_AN_OBJECT),
        (b"null", Reason.NOT_AN_OBJECT),
        (b"3", Reason.NOT_AN_OBJECT),
    ],
)
def test_a_bad_line_costs_one_row(tmp_path: Path, line: bytes, reason: Reason) -> None:
    rows = read_bytes(tmp_path / "bad.jsonl", b'{"a": 0}\n' + line + b'\n{"a": 2}\n')
    assert [raw.number for raw in rows] == [0, 1, 2]
    assert [raw.record for raw in rows] == [{"a": 0}, None, {"a": 2}]
    assert [raw.problem for raw in rows] == [None, reason, None]
    assert rows[1].excerpt.encode()[:4] == line[:4]
    assert len(rows[1].excerpt) <= 800


def test_a_bad_element_of_an_array_costs_one_row(tmp_path: Path) -> None:
    rows = read_bytes(tmp_path / "array.json", BOM + b'[{"a": 0}, "text", null, {"a": 3}]')
    assert [raw.record for raw in rows] == [{"a": 0}, None, None, {"a": 3}]
    assert [raw.problem for raw in rows] == [
        None,
        Reason.NOT_AN_OBJECT,
        Reason.NOT_AN_OBJECT,
        None,
    ]


def test_json_files_that_are_no_arrays(tmp_path: Path) -> None:
    one = read_bytes(tmp_path / "one.json", b'{\n "a": 0\n}')
    assert [raw.record for raw in one] == [{"a": 0}]
    lines = read_bytes(tmp_path / "lines.json", BOM + b'{"a": 0}\n\n{bad\n{"a": 3}\n')
    assert [(raw.number, raw.record) for raw in lines] == [(0, {"a": 0}), (2, None), (3, {"a": 3})]


@pytest.mark.parametrize("content", [b'[{"a": 0}, {"a"', b"[\xff]", b"prompt,chosen", b" "])
def test_a_broken_array_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"broken\.json: not a JSON array"):
        read_bytes(tmp_path / "broken.json", content)


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.gz", "rows.parquet"])
@pytest.mark.parametrize("damage", ["torn", "not even one"])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, name: str, damage: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    whole = path.read_bytes()
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        read_bytes(path, whole[: len(whole) * 2 // 3] if damage == "torn" else as_lines(ROWS))


def test_a_parquet_file_damaged_inside_is_refused_by_name(tmp_path: Path) -> None:
    """The footer at the end is whole, so that only reading the rows meets the damage."""
    write_parquet(tmp_path / "rows.parquet")
    content = bytearray((tmp_path / "rows.parquet").read_bytes())
    content[4:60] = bytes(56)
    with pytest.raises(DataError, match=r"rows\.parquet: cannot be read"):
        read_bytes(tmp_path / "rows.parquet", bytes(content))


def test_a_parquet_file_without_rows_has_no_split(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "none.parquet")
    assert split_file(str(tmp_path / "none.parquet"), 10) == []


def test_text_in_parquet_that_is_not_utf8_is_refused_by_name(tmp_path: Path) -> None:
    """Arrow writes and reads such bytes unseen; making a Python string of them raises."""
    text = [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")]
    column = pa.Array.from_buffers(pa.string(), 1, text)
    pq.write_table(pa.table({"prompt": column}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet"):
        read_all(tmp_path / "rows.parquet", 10)


def make_files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def test_folders_globs_and_paths(tmp_path: Path) -> None:
    """Sorted within a pattern, patterns in their order, each file once, other files left alone."""
    make_files(tmp_path, "b.jsonl", "a.json", "deep/c.parquet", "deep/d.jsonl.gz", "README.md")
    make_files(tmp_path, "z[1].json.gz")

    def names(*patterns: str) -> list[str]:
        found = find_files([str(tmp_path / pattern) for pattern in patterns])
        return [str(Path(path).relative_to(tmp_path)) for path in found]

    everything = ["a.json", "b.jsonl", "deep/c.parquet", "deep/d.jsonl.gz", "z[1].json.gz"]
    assert names(".") == everything
    assert names("*.json*") == ["a.json", "b.jsonl", "z[1].json.gz"]
    assert names("**/*.parquet") == ["deep/c.parquet"]
    assert names("z[1].json.gz") == ["z[1].json.gz"]
    mixed = names("deep", "b.jsonl", ".", "a.json")
    assert mixed == ["deep/c.parquet", "deep/d.jsonl.gz", "b.jsonl", "a.json", "z[1].json.gz"]


def test_relative_paths_and_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_files(tmp_path, "a.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_files(["a.jsonl", "./a.jsonl", "~/a.jsonl", "*.jsonl"]) == [
        str(tmp_path / "a.jsonl")
    ]


def test_two_names_of_one_file_are_one_file(tmp_path: Path) -> None:
    """Else its rows would be trained twice an epoch."""
    make_files(tmp_path, "a.jsonl", "deep/b.jsonl")
    patterns = [str(tmp_path / "a.jsonl"), str(tmp_path / "deep" / ".." / "a.jsonl")]
    assert find_files(patterns) == [str(tmp_path / "a.jsonl")]


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    make_files(tmp_path, "a.jsonl", "notes.txt")
    (tmp_path / "empty.jsonl").touch()
    patterns = ["gone.jsonl", "a.jsonl", "*.csv", "notes.txt", "empty.jsonl"]
    with pytest.raises(DataError) as caught:
        find_files([str(tmp_path / pattern) for pattern in patterns])
    gone, csv, notes, empty = caught.value.lines
    assert gone == f"{tmp_path}/gone.jsonl: no such file or folder"
    assert csv == f"{tmp_path}/*.csv: no such file or folder"
    assert notes.startswith(f"{tmp_path}/notes.txt: not a kind of file that is read (.jsonl, ")
    assert empty == f"{tmp_path}/empty.jsonl: is empty"
