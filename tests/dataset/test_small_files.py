"""Small files: a task and a file of shards for many of them, with the tokens of each apart."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.dataset import ingest as ingesting
from orpo_ray.dataset.ingest import SHOWN_FILES, ingest
from orpo_ray.dataset.order import Order
from orpo_ray.dataset.shards import TokenSet
from orpo_ray.dataset.stream import BatchPlan, TokenStream
from orpo_ray.preference.errors import DataError
from orpo_ray.preference.groups import RowId
from orpo_ray.reports.data import count_trained, write_data_report
from orpo_ray.runs.files import RunFiles
from orpo_ray.storage.folder import Folder
from tests.reference.ingest import map_tasks, request_of, text_row, write_rows

N_FILES = 130
BAD = {"prompt": "p", "chosen": "c"}


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, ...]:
    """Of one to seven rows each, every tenth with a bad one as well; one is empty.

    130 = 18 x 7 + 4 files: 18 x 28 + 10 rows, less the 6 of the empty one, and 13 bad ones.
    """
    found = []
    for number in range(N_FILES):
        rows = [text_row(10 * number + i) for i in range(number % 7 + 1)]
        rows = [] if number == 5 else rows + [BAD] * (number % 10 == 0)
        found.append(write_rows(tmp_path / f"{number:03d}.jsonl", rows))
    return tuple(found)


class Counted:
    """Runs tasks here, and counts them."""

    def __init__(self) -> None:
        self.n_tasks = 0

    def __call__(self, items, work):
        """Run them."""
        self.n_tasks += len(items)
        return map_tasks(items, work)


def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take no file for a small one."""
    monkeypatch.setattr(ingesting, "_SMALL_BYTES", -1)


def pairs_of(tokens: TokenSet) -> list[tuple]:
    return [
        (group.row_ids, group.prompt.tolist(), [ids.tolist() for ids in group.completions])
        for shard in tokens.shards
        for group in tokens.groups(shard)
    ]


def refused_of(tokens: TokenSet) -> list[str]:
    parts = [tokens.folder.path / part for part in tokens.report["quarantine"]]
    return [line for part in parts for line in part.read_text().splitlines()]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"val_set_size": 0.3},
        {"val_set_size": 0.3, "drop_duplicates": True},
        {"group_by_prompt": True},
    ],
    ids=["as they are", "held out", "dropped", "grouped"],
)
def test_small_files_give_what_each_alone_would(
    files, changes, tokenizer_folder, tmp_path, monkeypatch
):
    """The same shards in the same order, and the same counts, refused rows and digest."""
    files = (*files, files[3] + "x.jsonl")
    Path(files[-1]).write_bytes(Path(files[3]).read_bytes())  # repeats pairs
    request = request_of(files, tokenizer_folder, tmp_path / "a", shard_rows=12, **changes)
    together, apart = Counted(), Counted()
    one = ingest(request, together)
    alone(monkeypatch)
    other = ingest(replace(request, cache_directory=str(tmp_path / "b")), apart)
    assert one.digest == other.digest
    shown = [[(s.source, s.n_groups, s.n_tokens) for s in tokens.shards] for tokens in (one, other)]
    assert shown[0] == shown[1]
    assert pairs_of(one) == pairs_of(other)
    assert refused_of(one) == refused_of(other)
    reports = [dict(tokens.report) | {"quarantine": None} for tokens in (one, other)]
    assert reports[0] == reports[1]
    if not request.group_by_prompt:
        assert together.n_tasks < apart.n_tasks / 10
    stats = [len(list((tokens.folder.path / "stats").iterdir())) for tokens in (one, other)]
    assert stats[0] < 60 < N_FILES - 2 < stats[1]


def test_files_of_a_large_set_are_few(files, tokenizer_folder, tmp_path):
    """521 rows and shards of 4,096: one task, and one file each of shards, stats and bad rows."""
    tasks = Counted()
    request = request_of(files, tokenizer_folder, tmp_path, shard_rows=4096)
    tokens = ingest(request, tasks)
    assert tasks.n_tasks == 1
    assert len(tokens.shards) == N_FILES - 1  # one is empty
    assert len({shard.name for shard in tokens.shards}) == 1
    found = [path for path in tokens.folder.path.rglob("*") if path.is_file()]
    kinds = sorted(path.suffix for path in found if path.name != ".lock")
    assert kinds == [".json", ".jsonl", ".npz", ".npz", ".parquet"]


def test_the_stream_of_shards_in_one_file_is_that_of_files(
    files, tokenizer_folder, tmp_path, monkeypatch
):
    """And each file is opened once, however often windows come back to it."""
    request = request_of(files, tokenizer_folder, tmp_path / "a", shard_rows=8)
    one = ingest(request, map_tasks)
    alone(monkeypatch)
    other = ingest(replace(request, cache_directory=str(tmp_path / "b")), map_tasks)
    opened: list[str] = []
    table = TokenSet.table
    monkeypatch.setattr(
        TokenSet, "table", lambda self, name: opened.append(name) or table(self, name)
    )
    rows = []
    for tokens in (one, other):
        order = Order(tuple(s.n_groups for s in tokens.shards), 2, 0, shuffle=True)
        stream = TokenStream(tokens, order, BatchPlan(4, 256, 64, True), 0, 1)
        opened.clear()
        rows.append([batch.row_ids for batch in stream.batches(0, stream.steps_per_epoch)])
        if tokens is one:
            assert len(opened) == len({shard.name for shard in one.shards})
    assert rows[0] == rows[1]


def test_an_interrupted_task_is_not_done_again(files, tokenizer_folder, tmp_path):
    """What tasks wrote before the driver ended is taken as it is."""
    request = request_of(files, tokenizer_folder, tmp_path)

    def interrupted(items, work):
        map_tasks(items, work)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(request, interrupted)
    shards = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    assert shards
    tokens = ingest(request, map_tasks)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")} == shards
    assert tokens.report["rows_read"] == 521


def test_every_damaged_file_among_small_ones_is_named(files, tokenizer_folder, tmp_path):
    for number in (7, 20):
        Path(files[number] + ".gz").write_bytes(b"no archive")
    files = tuple(path + ".gz" if i in (7, 20) else path for i, path in enumerate(files))
    with pytest.raises(DataError) as caught:
        ingest(request_of(files, tokenizer_folder, tmp_path), map_tasks)
    assert len(caught.value.lines) == 2
    assert all(
        f"{i:03d}.jsonl.gz" in line for i, line in zip((7, 20), caught.value.lines, strict=True)
    )


def test_reports_have_the_first_files_and_how_many_there_are(files, tokenizer_folder, tmp_path):
    """130 files, of which 100 are shown; the totals are of all, also of what was trained."""
    tokens = ingest(request_of(files, tokenizer_folder, tmp_path), map_tasks)
    run = tmp_path / "run"
    run.mkdir()
    report = write_data_report(run, {"train": tokens}, ORPOConfig(), {})
    train = report["train"]
    assert list(train["sources"]) == list(files[:SHOWN_FILES])
    assert train["more_sources"] == {"files": N_FILES - SHOWN_FILES, "empty": 0, "first_empty": []}
    assert train["passed_over"] == {"that have no row": {"files": 1, "first": ["005.jsonl"]}} or (
        [part["files"] for part in train["passed_over"].values()] == [1]
    )
    assert train["rows_read"] == 521 == train["rows_kept"] + 13
    ledger = RunFiles(Folder.at(run), is_writer=True)
    ledger.ledger(1, 0, [RowId(1, 0), RowId(1, 1), RowId(129, 0)], [RowId(129, 1)])
    ledger.ledger(2, 0, [RowId(1, 0), RowId(400, 0)], ())
    found = count_trained(run, report, tokens)["train"]
    counts = [found[f"rows_{end}"] for end in ("trained", "skipped", "not_reached")]
    assert counts == [3, 1, train["rows_kept"] - 4]
    assert found["sources"][files[1]]["rows_trained"] == 2
    assert json.loads((run / "data_report.json").read_text())["train"]["rows_read"] == 521
