"""Finding, cutting and reading files of pairs."""

import gzip
import json
import logging
import lzma
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_ray.preference.errors import DataError
from orpo_ray.preference.reading.finding import find_files
from orpo_ray.preference.reading.readers import count_rows, read_split, split_file
from orpo_ray.preference.reading.rows import RawRow, Split
from orpo_ray.preference.reading.sources import file_fingerprint, kind_of
from orpo_ray.preference.records import Reason

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


def pack(path: Path, write: Callable[[Path], object]) -> None:
    plain = path.with_suffix("")
    write(plain)
    path.write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()


WRITERS: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": lambda path: path.write_bytes(as_lines(ROWS)),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(as_lines(ROWS))),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS)),
    "rows.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "rows.parquet": write_parquet,
    "stream.arrow": lambda path: write_arrow(path, stream=True),
    "file.feather": lambda path: write_arrow(path, stream=False),
    "rows.ndjson.bz2": lambda path: write_packed(path, "bz2"),
    "rows.jsonl.zst": lambda path: write_packed(path, "zstd"),
    "rows.jsonl.xz": lambda path: path.write_bytes(lzma.compress(as_lines(ROWS))),
    "stream.arrow.gz": lambda path: pack(path, lambda p: write_arrow(p, stream=True)),
    "rows.parquet.gz": lambda path: pack(path, write_parquet),
}


def write_arrow(path: Path, stream: bool) -> None:
    table = pa.Table.from_pylist(ROWS)
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def write_packed(path: Path, codec: str) -> None:
    with pa.CompressedOutputStream(str(path), codec) as file:
        file.write(as_lines(ROWS))


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


TABLE = 'prompt,chosen,rejected\np,"c,\n""d""",r\n\nq,c,\nx,y\n\xff,c,r\n'


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz", "rows.tsv"])
def test_tables_of_text(tmp_path: Path, name: str) -> None:
    """Numbered by the line on which a row begins: a cell of two lines, a blank line, bad ones."""
    text = TABLE if ".csv" in name else TABLE.replace(",", "\t")
    content = BOM + text.encode("latin-1")
    rows = read_bytes(tmp_path / name, gzip.compress(content) if ".gz" in name else content)
    cell = 'c,\n"d"' if ".csv" in name else 'c\t\n"d"'
    assert [(raw.number, raw.record, raw.problem) for raw in rows] == [
        (1, {"prompt": "p", "chosen": cell, "rejected": "r"}, None),
        (4, {"prompt": "q", "chosen": "c", "rejected": ""}, None),
        (5, None, Reason.MALFORMED_TABLE),
        (6, None, Reason.NOT_UTF8),
    ]


def test_a_table_that_names_a_column_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"bad\.csv: the header has a duplicate column"):
        read_bytes(tmp_path / "bad.csv", b"prompt,chosen,chosen\na,b,c\n")


def test_a_large_row_group_is_not_decoded_for_every_split(tmp_path: Path) -> None:
    """1000 rows in one group by 10: 8 splits of 130, a multiple of 10 not less than an eighth."""
    path = tmp_path / "wide.parquet"
    pq.write_table(pa.table({"a": range(1000)}), path)
    splits = split_file(str(path), 10)
    assert [split.n_rows for split in splits] == [130] * 7 + [90]
    rows = [raw for split in splits for raw in read_split(split)]
    assert [(raw.number, raw.record) for raw in rows] == [(i, {"a": i}) for i in range(1000)]


@pytest.mark.parametrize("name", WRITERS)
def test_rows_are_counted_without_looking_at_them(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert count_rows(str(tmp_path / name)) == 7


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """A folder behind a real HTTP server on this machine."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_url_is_read_as_a_file_is(tmp_path: Path, served: str) -> None:
    for name in ("rows.jsonl", "rows.jsonl.gz", "rows.parquet.gz"):
        WRITERS[name](tmp_path / name)
        (url,) = find_files([f"{served}/{name}"])
        rows = [raw for split in split_file(url, 3) for raw in read_split(split)]
        assert [raw.record for raw in rows] == ROWS
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file or folder"):
        find_files([f"{served}/gone.jsonl"])


def test_a_bucket_is_read_as_a_folder_is(tmp_path: Path, bucket: Any) -> None:
    """Plain lines are cut into parts there too; a file that changes has another identity."""
    for name in ("rows.jsonl", "rows.jsonl.gz", "rows.parquet"):
        WRITERS[name](tmp_path / name)
        bucket.put_object(Bucket="bucket", Key=f"deep/{name}", Body=(tmp_path / name).read_bytes())
    bucket.put_object(Bucket="bucket", Key="deep/notes.txt", Body=b"text")
    found = find_files(["s3://bucket/deep"])
    assert found == [
        "s3://bucket/deep/rows.jsonl",
        "s3://bucket/deep/rows.jsonl.gz",
        "s3://bucket/deep/rows.parquet",
    ]
    assert find_files(["s3://bucket/*/*.jsonl*"]) == found[:2]
    for url, n_splits in zip(found, (3, 1, 3), strict=True):
        splits = split_file(url, 3)
        assert len(splits) == n_splits
        assert [raw.record for split in splits for raw in read_split(split)] == ROWS
    before = file_fingerprint(found[0])
    assert file_fingerprint(found[0]) == before
    bucket.put_object(Bucket="bucket", Key="deep/rows.jsonl", Body=b'{"a": 1}\n')
    assert file_fingerprint(found[0]) != before
    with pytest.raises(DataError) as caught:
        find_files(["s3://bucket/gone.jsonl", "s3://none/a.jsonl", "s3://bucket/deep/notes.txt"])
    gone, none, notes = caught.value.lines
    assert gone == "s3://bucket/gone.jsonl: no such file or folder"
    assert none.startswith("s3://none/a.jsonl: ")
    assert notes.startswith("s3://bucket/deep/notes.txt: not a supported file type")


def test_lines_in_a_bucket_are_read_in_blocks(
    bucket: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The server logs every request; a file object of pyarrow reads a line byte by byte."""
    rows = [{"prompt": f"p{i}", "chosen": "yes", "rejected": "no"} for i in range(1000)]
    bucket.put_object(Bucket="bucket", Key="many.jsonl", Body=as_lines(rows))
    with caplog.at_level(logging.INFO, logger="werkzeug"):
        read = list(read_split(Split("s3://bucket/many.jsonl")))
    requests = [record for record in caplog.records if record.name == "werkzeug"]
    assert [row.record for row in read] == rows
    assert 1 <= len(requests) <= 10


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
    bad = {b"{nope": Reason.MALFORMED_JSON, b"\xff": Reason.NOT_UTF8}
    bad[b"[1]"] = Reason.NOT_AN_OBJECT
    problems = [bad.get(lines[number]) for number in expected]
    if lines[-1] == b"{nope":
        problems[-1] = Reason.TORN_LINE
    assert [raw.problem for raw in rows] == problems


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
        (b'{"a": "\xff"}', Reason.NOT_UTF8),
        (b'{"a": "\xed\xa0\xbd"}', Reason.NOT_UTF8),
        (b'{"a": 1, "a": 2}', Reason.DUPLICATE_KEY),
        (b'{"a": [{"role": 1, "role": 1}]}', Reason.DUPLICATE_KEY),
        (b"[" * 100_000, Reason.TOO_DEEP),
        (b'{"a": ' + b"[" * 400 + b"]" * 400 + b"}", Reason.TOO_DEEP),
        (b'{"a": ' * 900 + b"1" + b"}" * 900, Reason.TOO_DEEP),
        (b'{"a": ' + b'[{"b": ' * 60 + b"1" + b"}]" * 60 + b"}", Reason.TOO_DEEP),
        (b"[" * 950 + b"]" * 950, Reason.TOO_DEEP),
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


@pytest.mark.parametrize("content", [b'[{"a": 0}, {"a"', b"[\xff]", b"prompt,chosen"])
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


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.ndjson"])
@pytest.mark.parametrize("content", [b"", b" \n\t\r\n", BOM])
@pytest.mark.parametrize("packed", [False, True])
def test_a_file_of_blanks_has_no_rows(
    tmp_path: Path, name: str, content: bytes, packed: bool
) -> None:
    """Nor has an archive of nothing, or a table of a header alone."""
    path = tmp_path / f"{name}{'.gz' * packed}"
    assert read_bytes(path, gzip.compress(content) if packed else content) == []
    if kind_of(name) == ".csv":
        assert read_bytes(tmp_path / "header.csv", b"prompt,chosen,rejected\n") == []
    if packed:
        assert read_bytes(tmp_path / "a.arrow.gz", gzip.compress(b"")) == []


@pytest.mark.parametrize("name", WRITERS)
def test_suffixes_in_capitals_are_read(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    loud = (tmp_path / name).rename(tmp_path / f"ROWS.{name.partition('.')[2].upper()}")
    assert kind_of(str(loud)) == kind_of(name)
    assert [raw.record for raw in read_all(loud, 3)] == ROWS
    assert len(split_file(str(loud), 3)) == len(split_file(str(loud.rename(tmp_path / name)), 3))
    assert count_rows(str(tmp_path / name)) == 7


def test_a_parquet_file_without_rows_has_no_split(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "none.parquet")
    assert split_file(str(tmp_path / "none.parquet"), 10) == []


def test_a_value_in_parquet_that_python_does_not_take_costs_one_row(tmp_path: Path) -> None:
    """Arrow keeps bytes that are no UTF-8, and years beyond 9999, unseen."""
    text = [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"\xffa")]
    days = pa.array([0, 2**30], pa.int32()).cast(pa.date32())
    strings = pa.Array.from_buffers(pa.string(), 2, text)
    pq.write_table(pa.table({"prompt": strings}), tmp_path / "rows.parquet")
    pq.write_table(pa.table({"prompt": ["a", "b"], "when": days}), tmp_path / "days.parquet")
    rows = read_all(tmp_path / "rows.parquet", 10)
    assert [(raw.record, raw.problem) for raw in rows] == [
        (None, Reason.NOT_UTF8),
        ({"prompt": "a"}, None),
    ]
    rows = read_all(tmp_path / "days.parquet", 10)
    assert [raw.problem for raw in rows] == [None, Reason.WRONG_TYPE]


def test_a_repeated_key_in_an_array_costs_one_row(tmp_path: Path) -> None:
    content = b'[{"a": 0}, {"a": 1, "a": 2}, {"a": [{"b": 1, "b": 2}]}, {"a": 3}]'
    rows = read_bytes(tmp_path / "array.json", content)
    assert [raw.problem for raw in rows] == [None, Reason.DUPLICATE_KEY, Reason.DUPLICATE_KEY, None]


def test_a_table_that_cannot_be_read_on_names_the_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"bad\.csv:3: cannot be read further"):
        read_bytes(tmp_path / "bad.csv", b'prompt,chosen\na,b\n"x"y,c\n')
