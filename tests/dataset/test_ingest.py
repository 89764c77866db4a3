"""Ingest: every format and every reason in, token shards and their counts out."""

import gzip
import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.dataset.ingest import ingest, nothing_usable
from orpo_ray.dataset.request import IngestRequest
from orpo_ray.dataset.shards import MANIFEST_NAME, TokenSet, read_shard
from orpo_ray.dataset.tokenize import TokenizeSplit
from orpo_ray.demo.model import CHAT_TEMPLATE, train_tokenizer
from orpo_ray.preference.errors import DataError
from orpo_ray.preference.groups import PromptGroup, RowId
from orpo_ray.preference.pairing import normalise
from orpo_ray.preference.reading.readers import split_file
from orpo_ray.preference.records import Reason, Record
from orpo_ray.preference.shapes import RowReader
from orpo_ray.preference.templates import render
from orpo_ray.preference.tokenization import Limits, PairTokenizer, TokenizedPair
from orpo_ray.reports.data import length_tallies, write_data_report
from tests.reference.ingest import (
    BEFORE,
    LIMITS,
    LONG,
    MAX_LENGTH,
    SHARD_ROWS,
    chat_row,
    file_bytes,
    groups_of,
    map_tasks,
    text_row,
)

# One line each, and why it is refused; the four without a reason are kept.
LINES: list[tuple[bytes | dict[str, Any], Reason | None]] = [
    (text_row(0), None),
    (b'{"prompt": "cut', Reason.MALFORMED_JSON),
    (b"[1, 2]", Reason.NOT_AN_OBJECT),
    ({"prompt": "p", "chosen": "c"}, Reason.MISSING_FIELD),
    (text_row(1), None),
    (text_row(0) | {"chosen": 7}, Reason.WRONG_TYPE),
    (text_row(0) | {"chosen": "\ud83d"}, Reason.BAD_SURROGATE),
    (text_row(0) | {"chosen": []}, Reason.EMPTY_CHOSEN),
    (chat_row(0) | {"chosen": [{"role": "assistant"}]}, Reason.BAD_MESSAGE),
    (chat_row(0) | {"chosen": [{"role": "user", "content": "c"}]}, Reason.NOT_AN_ANSWER),
    (text_row(0) | {"chosen": " "}, Reason.EMPTY_CHOSEN),
    (text_row(0) | {"rejected": ""}, Reason.EMPTY_REJECTED),
    (text_row(0) | {"rejected": "yes"}, Reason.IDENTICAL_ANSWERS),
    ({"chosen": BEFORE + "a", "rejected": "\n\nAssistant: b"}, Reason.PROMPT_NOT_SHARED),
    (text_row(0) | {"prompt": LONG}, Reason.PROMPT_TOO_LONG),
    (
        text_row(0) | {"chosen": LONG + "a", "rejected": LONG + "b"},
        Reason.IDENTICAL_AFTER_TRUNCATION,
    ),
    (text_row(2) | {"chosen": LONG}, None),
    (chat_row(3), None),
]
N_KEPT = {"lines.jsonl": 4, "packed.jsonl.gz": 5, "array.json": 4, "table.parquet": 7}
N_READ = N_KEPT | {"lines.jsonl": len(LINES), "array.json": 5}
DIALOGUES = [{"chosen": BEFORE + f" {i}a", "rejected": BEFORE + f" {i}b"} for i in range(5)]


def write_files(folder: Path) -> tuple[str, ...]:
    """A file of every kind, in the order of their names as given, not of the alphabet."""
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line, _ in LINES]
    (folder / "lines.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines) + b"\r\n\r\n")
    packed = "\n\n".join(map(json.dumps, DIALOGUES))
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(packed.encode()))
    array = [chat_row(0), text_row(1), "no object", chat_row(2), text_row(3)]
    (folder / "array.json").write_text(json.dumps(array))
    table = pa.Table.from_pylist([chat_row(i) for i in range(7)])
    pq.write_table(table, folder / "table.parquet", row_group_size=4)
    return tuple(str(folder / name) for name in N_KEPT)


@dataclass(frozen=True)
class Ingested:
    """What was asked for, and what came of it."""

    request: IngestRequest
    tokens: TokenSet

    def groups(self) -> list[PromptGroup]:
        """All groups, in the order of the shards."""
        return groups_of(self.tokens)


@pytest.fixture(scope="module")
def ingested(tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Ingested:
    folder = tmp_path_factory.mktemp("files")
    request = IngestRequest(
        files=write_files(folder),
        tokenizer=tokenizer_folder,
        revision=None,
        limits=LIMITS,
        shard_rows=SHARD_ROWS,
        cache_directory=str(tmp_path_factory.mktemp("cache")),
    )
    return Ingested(request, ingest(request, map_tasks))


def test_every_row_read_is_kept_or_refused(ingested: Ingested) -> None:
    report = ingested.tokens.report
    refused = Counter(str(reason) for _, reason in LINES if reason) + Counter(["not_an_object"])
    assert report["refused"] == dict(refused)
    assert report["rows_read"] == sum(N_READ.values()) == 35
    assert report["rows_kept"] == sum(N_KEPT.values()) == ingested.tokens.n_pairs
    assert report["rows_refused"] == refused.total()
    assert report["rows_read"] == report["rows_kept"] + report["rows_refused"]


def test_every_file_has_its_own_counts(ingested: Ingested) -> None:
    sources = ingested.tokens.report["sources"]
    assert [Path(path).name for path in sources] == list(N_KEPT)
    assert tuple(sources) == ingested.tokens.sources == ingested.request.files
    for path, counts in sources.items():
        name = Path(path).name
        assert (counts["rows_read"], counts["rows_kept"]) == (N_READ[name], N_KEPT[name])
        assert counts["rows_refused"] == N_READ[name] - N_KEPT[name]
    for count in ("tokens", "truncated_pairs", "rows_refused"):
        total = sum(counts[count] for counts in sources.values())
        assert ingested.tokens.report[count] == total


def test_tokens_and_cut_answers_are_counted(ingested: Ingested) -> None:
    """An answer that was cut is one that does not end in the end of sequence."""
    groups = ingested.groups()
    report = ingested.tokens.report
    assert report["tokens"] == sum(group.n_tokens for group in groups)
    assert report["tokens"] == sum(shard.n_tokens for shard in ingested.tokens.shards)
    assert report["longest_group_tokens"] == max(group.n_tokens for group in groups)
    eos = ingested.request.pair_tokenizer().tokenizer.eos_token_id
    cut = [group for group in groups if {int(ids[-1]) for ids in group.completions} != {eos}]
    assert RowId(0, 16) in {group.row_ids[0] for group in cut}  # the long answer
    assert report["truncated_pairs"] == len(cut) < len(groups)
    for group in groups:
        lengths = [len(group.prompt) + len(ids) for ids in group.completions]
        assert max(lengths) <= MAX_LENGTH


def test_shards_are_in_the_order_of_the_files(ingested: Ingested) -> None:
    """Rows count from 0, blank lines too, so every other line of the packed file has a pair."""
    kept = [row for row, (_, reason) in enumerate(LINES) if reason is None]
    rows = [kept, [0, 2, 4, 6, 8], [0, 1, 3, 4], list(range(7))]
    expected = [RowId(source, row) for source, numbers in enumerate(rows) for row in numbers]
    assert [group.row_ids for group in ingested.groups()] == [(row_id,) for row_id in expected]
    for shard in ingested.tokens.shards:
        groups = read_shard(f"{ingested.tokens.folder.path}/{shard.name}")
        assert len(groups) == shard.n_groups == shard.n_pairs <= SHARD_ROWS
        assert sum(group.n_tokens for group in groups) == shard.n_tokens


def test_rows_with_one_answer_have_no_rejected_one(
    ingested: Ingested, tokenizer_folder: str, tmp_path: Path
) -> None:
    """For fine-tuning; they count neither as contradicted nor in the bias of lengths."""
    rows = [{"prompt": f"p {i}", "completion": f" c {i}"} for i in range(3)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, text_row(9)]))
    request = replace(ingested.request, files=(str(path),), cache_directory=str(tmp_path / "cache"))
    tokens = ingest(replace(request, reader=RowReader(takes_one_answer=True)), map_tasks)
    assert [len(group.completions) for group in groups_of(tokens)] == [1, 1, 1, 2]
    assert [group.pairs for group in groups_of(tokens)] == [((0, 0),)] * 3 + [((0, 1),)]
    report = tokens.report
    assert report["rows_kept"] == 4
    assert report["contradicting_pairs"] == 0
    assert report["pairs_equally_long"] >= 3
    tallies = length_tallies(tokens)
    assert (tallies["rejected"].sum(), tallies["chosen"].sum()) == (1, 4)
    refused = ingest(request, map_tasks)
    assert refused.report["rows_kept"] == 1
    assert refused.folder != tokens.folder


def test_tokens_are_those_of_the_row(ingested: Ingested) -> None:
    """The steps of one row, done here one by one for every row of the four files."""
    lines = [line if isinstance(line, dict) else {} for line, _ in LINES]
    rows: list[dict[int, dict[str, Any]]] = [
        dict(enumerate(lines)),
        {2 * i: row for i, row in enumerate(DIALOGUES)},
        {0: chat_row(0), 1: text_row(1), 3: chat_row(2), 4: text_row(3)},
        {i: chat_row(i) for i in range(7)},
    ]
    tokenizer = ingested.request.pair_tokenizer().tokenizer
    pairs = PairTokenizer(tokenizer, LIMITS)
    for group in ingested.groups():
        (row_id,) = group.row_ids
        record = normalise(rows[row_id.source][row_id.row])
        assert isinstance(record, Record)
        (expected,) = pairs.tokenize([render(record, tokenizer)], [row_id])
        assert isinstance(expected, TokenizedPair)
        assert group.prompt.tolist() == expected.group.prompt.tolist()
        for completion, other in zip(group.completions, expected.group.completions, strict=True):
            assert completion.tolist() == other.tolist()


def test_every_refused_row_is_in_quarantine(ingested: Ingested, tmp_path: Path) -> None:
    """Rows count from 1 there, as editors count lines."""
    write_data_report(tmp_path, {"train": ingested.tokens}, ORPOConfig(), {})
    lines = (tmp_path / "quarantine" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    first, _, third, _ = ingested.request.files
    bad = [(first, row + 1, str(reason)) for row, (_, reason) in enumerate(LINES) if reason]
    bad.append((third, 3, "not_an_object"))
    assert [(entry["file"], entry["row"], entry["reason"]) for entry in entries] == bad
    assert entries[0]["excerpt"] == '{"prompt": "cut'
    assert entries[-1]["excerpt"] == "no object"
    assert all(0 < len(entry["excerpt"]) <= 200 and entry["detail"] for entry in entries)
    report = json.loads((tmp_path / "data_report.json").read_text())
    assert report["train"]["rows_refused"] == len(entries)


def test_the_same_files_give_the_same_bytes(ingested: Ingested, tmp_path: Path) -> None:
    again = ingest(replace(ingested.request, cache_directory=str(tmp_path)), map_tasks)
    assert again == replace(ingested.tokens, folder=again.folder)
    assert again.folder.path.name == ingested.tokens.folder.path.name
    old, new = file_bytes(ingested.tokens.folder.path), file_bytes(again.folder.path)
    assert old.pop(MANIFEST_NAME) != new.pop(MANIFEST_NAME)  # each names its folder
    assert new == old


def test_an_ingest_that_died_before_its_manifest_is_done_again(
    ingested: Ingested, tmp_path: Path
) -> None:
    first = ingest(replace(ingested.request, cache_directory=str(tmp_path)), map_tasks)
    whole = file_bytes(first.folder.path)
    Path(first.folder.path, MANIFEST_NAME).unlink()
    Path(first.folder.path, first.shards[0].name).write_bytes(b"torn")
    Path(first.folder.path, first.shards[-1].name).unlink()
    assert ingest(replace(ingested.request, cache_directory=str(tmp_path)), map_tasks) == first
    assert file_bytes(first.folder.path) == whole


CACHED = """
import json, pickle, sys
from orpo_ray.dataset.pair_index import load_keys
from orpo_ray.dataset.ingest import ingest, nothing_usable
tokens = ingest(pickle.loads(bytes.fromhex(sys.argv[1])), None)  # no task is run
print(json.dumps([str(tokens.folder.path), tokens.report, "ray" in sys.modules]))
"""


@pytest.mark.long
def test_a_second_process_finds_the_tokens_without_ray(ingested: Ingested) -> None:
    """Not even imported, so that a resume or a trial starts at once; no file is touched."""
    before = {path: path.stat().st_mtime_ns for path in ingested.tokens.folder.path.rglob("*")}
    command = [sys.executable, "-c", CACHED, pickle.dumps(ingested.request).hex()]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    directory, report, imported_ray = json.loads(answer.stdout)
    assert (directory, report) == (str(ingested.tokens.folder.path), ingested.tokens.report)
    assert imported_ray is False
    after = {path: path.stat().st_mtime_ns for path in ingested.tokens.folder.path.rglob("*")}
    assert after == before


def test_what_changes_the_tokens_changes_the_key(
    ingested: Ingested, tokenizer_folder: str, tmp_path: Path
) -> None:
    """Lengths, shard sizes, a template, another tokenizer, a file's content, fewer files."""
    (tmp_path / "rows.jsonl").write_text(json.dumps(text_row(1)) + "\n")
    base = replace(
        ingested.request, files=(str(tmp_path / "rows.jsonl"),), cache_directory=str(tmp_path)
    )
    template = AutoTokenizer.from_pretrained(tokenizer_folder)
    template.chat_template = CHAT_TEMPLATE.replace("assistant:", "model:")
    template.save_pretrained(tmp_path / "template")
    train_tokenizer(["other words"]).save_pretrained(tmp_path / "other")
    requests = [
        base,
        replace(base, limits=Limits(MAX_LENGTH + 1)),
        replace(base, shard_rows=SHARD_ROWS + 1),
        replace(base, tokenizer=str(tmp_path / "template")),
        replace(base, tokenizer=str(tmp_path / "other")),
    ]
    directories = [ingest(request, map_tasks).folder.path for request in requests]
    assert ingest(base, map_tasks).folder.path == directories[0]
    (tmp_path / "rows.jsonl").write_text(json.dumps(text_row(2)) + "\n")
    changed = ingest(base, map_tasks)
    assert len({*directories, changed.folder.path}) == len(requests) + 1
    assert changed.report["rows_kept"] == 1


def request_for(ingested: Ingested, folder: Path, name: str, content: bytes) -> IngestRequest:
    (folder / name).write_bytes(content)
    return replace(
        ingested.request, files=(str(folder / name),), cache_directory=str(folder / "cache")
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("torn.jsonl.gz", gzip.compress(os.urandom(1000))[:-20]),
        ("broken.json", b'[{"prompt": "p"'),
        ("broken.parquet", b"PAR1 not really"),
    ],
)
def test_a_file_that_cannot_be_read_ends_the_ingest(
    ingested: Ingested, tmp_path: Path, name: str, content: bytes
) -> None:
    """The data task's error reaches the driver as it is, and no token set exists."""
    with pytest.raises(DataError, match=name.replace(".", r"\.")) as caught:
        ingest(request_for(ingested, tmp_path, name, content), map_tasks)
    assert len(caught.value.lines) == 1
    assert list(tmp_path.rglob(MANIFEST_NAME)) == []


def test_when_every_row_is_refused_the_first_are_shown(ingested: Ingested, tmp_path: Path) -> None:
    """Also the second time, from the cache."""
    request = request_for(ingested, tmp_path, "bad.jsonl", b"{\n\n" + b'{"prompt": "p"}\n' * 4)
    path = tmp_path / "bad.jsonl"
    for _ in range(2):
        counts, *rows = nothing_usable(ingest(request, map_tasks))
        assert counts == f"no usable row in {path}: 1 malformed_json, 4 missing_field"
        assert rows[0] == f"{path}:1: malformed_json: the line is not valid JSON"
        assert rows[1].startswith(f"{path}:3: missing_field: chosen is missing")


def test_files_without_rows_are_refused(ingested: Ingested, tmp_path: Path) -> None:
    (line,) = nothing_usable(
        ingest(request_for(ingested, tmp_path, "blank.jsonl", b"\n  \n"), map_tasks)
    )
    assert line.endswith("the files contain no rows")


def test_messages_without_a_template_are_refused(ingested: Ingested, tmp_path: Path) -> None:
    plain = AutoTokenizer.from_pretrained(ingested.request.tokenizer)
    plain.chat_template = None
    plain.save_pretrained(tmp_path / "plain")
    request = request_for(ingested, tmp_path, "chat.jsonl", json.dumps(chat_row(0)).encode())
    with pytest.raises(DataError, match="no chat template"):
        ingest(replace(request, tokenizer=str(tmp_path / "plain")), map_tasks)


SURROGATE = chat_row(1) | {"chosen": [{"role": "assistant", "content": "half \ud83d"}]}
SYSTEM = chat_row(1) | {"prompt": [{"role": "system", "content": "s"}]}


@pytest.mark.parametrize("row", [SURROGATE, SYSTEM], ids=["surrogate", "template"])
def test_a_row_that_cannot_be_rendered_or_encoded_costs_one_row(
    ingested: Ingested, tmp_path: Path, row: dict[str, Any]
) -> None:
    """Gemma's and Mistral's templates raise on turns that they do not know."""
    strict = AutoTokenizer.from_pretrained(ingested.request.tokenizer)
    strict.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        + CHAT_TEMPLATE
    )
    strict.save_pretrained(tmp_path / "strict")
    lines = "\n".join(map(json.dumps, [chat_row(0), row, chat_row(2)]))
    request = request_for(ingested, tmp_path, "chat.jsonl", lines.encode())
    report = ingest(replace(request, tokenizer=str(tmp_path / "strict")), map_tasks).report
    assert (report["rows_read"], report["rows_kept"], report["rows_refused"]) == (3, 2, 1)


def test_a_shard_that_a_killed_ingest_finished_is_not_written_again(ingested, tmp_path):
    """The data task of a split, run by itself: once, again, and with one of its shards undone."""
    for name in ("quarantine", "done", "stats"):
        (tmp_path / name).mkdir()
    lines = ingested.request.files[0]
    task = TokenizeSplit(ingested.request, str(tmp_path))
    [split] = split_file(lines, 10**9)
    item = {"item": json.dumps({"source": 0, "split": asdict(split)})}
    first = task(item)
    shards = sorted(tmp_path.glob("*.parquet"))
    times = [path.stat().st_mtime_ns for path in shards]
    assert len(first) == len(list((tmp_path / "done").iterdir())) > len(shards) > 1
    assert task(item) == first
    assert [path.stat().st_mtime_ns for path in shards] == times
    contents = [path.read_bytes() for path in shards]
    (tmp_path / "done" / f"{shards[0].stem}.json").unlink()
    shards[0].unlink()
    assert task(item) == first
    assert [path.read_bytes() for path in shards] == contents
    assert [path.stat().st_mtime_ns for path in shards[1:]] == times[1:]


def test_a_shard_of_long_rows_ends_before_shard_rows(ingested, tmp_path, monkeypatch):
    """Every row is in one shard, once and in order, and no shard is much above the limit."""
    monkeypatch.setattr("orpo_ray.dataset.tokenize._SHARD_TOKENS", 1000)
    pairs = [
        {"prompt": f"{i} " + "a b " * length, "chosen": "c", "rejected": "d"}
        for i, length in enumerate([1, 2, 400, 800, 3, 200, 200, 200, 1, 900, 1, 1])
    ]
    lines = "\n".join(map(json.dumps, pairs)).encode()
    request = request_for(ingested, tmp_path, "long.jsonl", lines)
    tokens = ingest(replace(request, limits=Limits(4096), shard_rows=10), map_tasks)
    rows = [[row.row for g in tokens.groups(s) for row in g.row_ids] for s in tokens.shards]
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [10, 11]]
    short = ingest(replace(request, limits=Limits(16), shard_rows=10), map_tasks)
    assert [shard.n_groups for shard in short.shards] == [10, 2]
