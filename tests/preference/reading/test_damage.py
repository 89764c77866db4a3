"""Damaged files of every format: an error that names the file, never the end of the process."""

import gzip
import json
import struct
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from orpo_ray.preference.errors import DataError
from orpo_ray.preference.reading.readers import read_split, split_file
from orpo_ray.preference.reading.rows import RawRow, Split
from orpo_ray.preference.records import Reason
from tests.preference.reading import damage

ROOT = Path(__file__).resolve().parents[3]
OFFSETS = {"far": 2_000_000_000, "behind": 1_000_000, "negative": -2_000_000_000, "minus": -1}


def write_stream(path: Path, batch: pa.RecordBatch) -> Path:
    with pa.ipc.new_stream(path, batch.schema) as writer:
        writer.write_batch(batch)
    return path


@pytest.mark.slow
def test_300_damaged_files_of_each_format_end_no_process(tmp_path):
    """In a process of its own, as a crash would end this one."""
    done = subprocess.run(
        [sys.executable, "-m", damage.__name__, str(tmp_path), "300"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert lines[-1:] == ["done"], f"{done.returncode} at {lines[-1:]}: {done.stderr[-2000:]}"
    assert len(lines) == 300 * len(damage.whole_files()) + 1


def write_bad_offsets(folder: Path) -> list[Path]:
    """Files whose column begins with the values 0, 10, 20 and on, of which one is overwritten."""
    texts = pa.array([f"text {i:05d}" for i in range(50)])
    offsets = pa.array(range(0, 510, 10), pa.int32())
    indices = pa.array([i * 10 % 50 for i in range(50)], pa.int32())
    columns = {
        "text": texts,
        "list": pa.ListArray.from_arrays(offsets, pa.array([0] * 500)),
        "dictionary": pa.DictionaryArray.from_arrays(indices, texts),
        "struct": pa.StructArray.from_arrays([texts], ["text"]),
    }
    paths = []
    for kind, column in columns.items():
        path = write_stream(folder / f"{kind}.arrow", pa.record_batch({"column": column}))
        raw = path.read_bytes()
        at = raw.find(struct.pack("<4i", 0, 10, 20, 30)) + 80
        for name, offset in OFFSETS.items():
            paths.append(folder / f"{kind}-{name}.arrow")
            paths[-1].write_bytes(raw[:at] + struct.pack("<i", offset) + raw[at + 4 :])
    return paths


@pytest.mark.long
def test_offsets_that_lead_out_of_a_column_are_damage(tmp_path):
    program = (
        "import sys; from orpo_ray.preference.errors import DataError\n"
        "from orpo_ray.preference.reading.readers import read_split, Split\n"
        "for path in sys.argv[1:]:\n"
        "    try: list(read_split(Split(path)))\n"
        "    except DataError as error: print(error, flush=True)"
    )
    paths = write_bad_offsets(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, paths)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    said = [line.split(": cannot be read: ")[0] for line in done.stdout.splitlines()]
    assert said == [str(path) for path in paths]


def rows_of(path: Path) -> list[RawRow]:
    return [raw for split in split_file(str(path), 16) for raw in read_split(split)]


def test_a_text_that_is_no_utf8_still_costs_only_its_row(tmp_path):
    """Beside a dictionary and a list, whose validation looks at all texts at once."""
    texts = pa.array([b"one", b"\xff\xfe", b"three"]).view(pa.string())
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), texts)
    for column in (texts, lists):
        path = write_stream(tmp_path / "a.arrow", pa.record_batch({"a": column, "b": [1, 2, 3]}))
        assert [raw.problem for raw in rows_of(path)] == [None, Reason.NOT_UTF8, None]
    words = pa.DictionaryArray.from_arrays(pa.array([0, 2, 0], pa.int32()), texts)
    path = write_stream(tmp_path / "d.arrow", pa.record_batch({"a": words}))
    with pytest.raises(DataError, match="Dictionary"):
        rows_of(path)


@pytest.mark.parametrize("n_rows", [10_000, (1 << 31) - 1])
def test_rows_that_take_no_bytes_are_refused_at_once(tmp_path, n_rows):
    nothing = pa.record_batch({"prompt": pa.nulls(n_rows)})
    once = pa.RunEndEncodedArray.from_arrays(pa.array([n_rows], pa.int64()), pa.array(["x"]))
    for batch in (nothing, pa.record_batch({"prompt": once})):
        with pytest.raises(DataError, match=f"{n_rows} rows in "):
            rows_of(write_stream(tmp_path / "claims.arrow", batch))


def test_a_parquet_file_whose_row_groups_do_not_add_up_is_refused(tmp_path):
    """`num_rows` of the footer is a zigzag integer of two bytes; the groups have 20 rows each."""
    content = damage.whole_files()["rows.parquet"]
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    at = content.index(b"\x16\x78\x19", footer)  # field 3, i64: 60 rows; then a list
    path = tmp_path / "bad.parquet"
    path.write_bytes(content[: at + 1] + b"\x7a" + content[at + 2 :])
    with pytest.raises(DataError, match="its row groups do not add up"):
        rows_of(path)


def test_a_deep_element_of_an_array_costs_one_row(tmp_path):
    deep = json.loads('{"meta": ' + "[" * 300 + "]" * 300 + "}")
    path = tmp_path / "rows.json.gz"
    path.write_bytes(gzip.compress(json.dumps([{"a": 0}, deep, deep["meta"], {"a": 3}]).encode()))
    problems = [raw.problem for raw in read_split(Split(str(path)))]
    assert problems == [None, Reason.TOO_DEEP, Reason.TOO_DEEP, None]


def test_a_file_of_nothing_but_depth_costs_one_row_or_names_the_file(tmp_path):
    path = tmp_path / "deep.json"
    path.write_text('{"a":' * 50_000)
    assert [raw.problem for raw in rows_of(path)] == [Reason.TOO_DEEP]
    path.write_text("[" * 50_000)
    with pytest.raises(DataError, match=str(path)):
        rows_of(path)
