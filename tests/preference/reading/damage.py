"""Reads damaged files of every format, in a process of its own: `python -m ... FOLDER N [FIRST]`.

Prints the file that it is about to read, and at the end `done`. So of a crash the last line is
known. Whatever is no `DataError` is raised.
"""

import bz2
import gzip
import json
import lzma
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orpo_ray.preference.errors import DataError
from orpo_ray.preference.reading.readers import count_rows, read_split, split_file
from orpo_ray.preference.records import excerpt
from orpo_ray.preference.shapes import RowReader
from tests.reference.ingest import text_row

_ROWS = [text_row(i) | {"tags": ["a", "b"][: i % 3], "n": i, "meta": {"k": i}} for i in range(60)]
_SPLIT_ROWS = 16


def _table() -> pa.Table:
    table = pa.Table.from_pylist(_ROWS)
    return table.append_column("kind", pa.array(["x", "y"] * 30).dictionary_encode())


def _ipc(new: Callable[..., Any], compression: str | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with new(sink, _table().schema, options=options) as writer:
        writer.write_table(_table(), max_chunksize=25)
    return bytes(sink.getvalue())


def _parquet(**how: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(_table(), sink, row_group_size=20, **how)
    return bytes(sink.getvalue())


def _zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return bytes(sink.getvalue())


def whole_files() -> dict[str, bytes]:
    """A whole file of each format, by its name."""
    lines = "".join(json.dumps(row) + "\n" for row in _ROWS).encode()
    header = ["prompt", "chosen", "rejected"]
    cells = [header, *([str(row[name]) for name in header] for row in _ROWS)]
    return {
        "rows.jsonl": lines,
        "rows.json": json.dumps(_ROWS).encode(),
        "rows.csv": "".join(",".join(f'"{c}"' for c in row) + "\n" for row in cells).encode(),
        "rows.tsv": "".join("\t".join(row) + "\n" for row in cells).encode(),
        "rows.parquet": _parquet(),
        "zstd.parquet": _parquet(compression="zstd", use_dictionary=False, version="2.6"),
        "stream.arrow": _ipc(pa.ipc.new_stream),
        "lz4.arrow": _ipc(pa.ipc.new_stream, "lz4"),
        "file.feather": _ipc(pa.ipc.new_file),
        "rows.jsonl.gz": gzip.compress(lines),
        "rows.jsonl.bz2": bz2.compress(lines),
        "rows.jsonl.xz": lzma.compress(lines),
        "rows.jsonl.zst": _zstd(lines),
        "rows.parquet.gz": gzip.compress(_parquet()),
    }


def damaged(content: bytes, chance: random.Random) -> bytes:
    """The content with one to three kinds of damage."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(data) + 1)
        length = chance.choice((1, 4, 8, 100))
        number = chance.choice((0, 1, 255, 1 << 31, (1 << 31) - 1, 1 << 62, (1 << 64) - 5, at))
        match chance.randrange(6):
            case 0:
                data[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                at -= at % 4
                data[at : at + 4] = (number & 0xFFFFFFFF).to_bytes(4, "little")
            case 2:
                at -= at % 8
                data[at : at + 8] = number.to_bytes(8, "little")
            case 3:
                del data[at:]
            case 4:
                del data[at : at + length]
            case 5:
                data[at:at] = data[max(0, at - length) : at]
    return bytes(data)


def read_all(path: Path) -> None:
    """Read a file as an ingest does, up to the pairs of its rows."""
    try:
        for split in split_file(str(path), _SPLIT_ROWS):
            for raw in read_split(split):
                if raw.record is not None:
                    RowReader().read(raw.record)
                    excerpt(raw.record)
        count_rows(str(path))
    except DataError as error:
        if str(path) not in str(error):
            raise AssertionError(f"does not name {path}") from error


def main(folder: str, n_files: str, first: str = "0") -> None:
    """Read that many damaged files of each format."""
    for name, content in whole_files().items():
        path = Path(folder, name)
        path.write_bytes(content)
        read_all(path)
        for number in range(int(first), int(first) + int(n_files)):
            print(name, number, flush=True)
            path.write_bytes(damaged(content, random.Random(f"{name} {number}")))
            read_all(path)
    print("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
