"""Tasks of Ray Data: they write what one process writes, also where one is killed."""

import gzip
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from orpo_ray.dataset.ingest import ingest
from orpo_ray.dataset.request import MapTasks
from orpo_ray.dataset.shards import MANIFEST_NAME
from orpo_ray.dataset.tokenize import TokenizeSplit
from orpo_ray.orchestration.tasks import Progress, map_tasks
from orpo_ray.preference.errors import DataError
from orpo_ray.preference.reading.readers import split_file
from tests.reference import ingest as in_this_process
from tests.reference.ingest import SHARD_ROWS, file_bytes, request_of, text_row, write_rows

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> str:
    return in_this_process.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[str, str]:
    """A file of 40 rows, which is cut into splits, and one of 12 that stays whole."""
    folder = tmp_path_factory.mktemp("files")
    whole = folder / "whole.jsonl.gz"
    lines = "\n".join(json.dumps(text_row(i)) for i in range(30, 42))
    whole.write_bytes(gzip.compress(lines.encode()))
    return write_rows(folder / "cut.jsonl", [text_row(i) for i in range(40)]), str(whole)


def token_set(tasks: MapTasks, files: tuple[str, ...], tokenizer: str, folder: Path, **changes):
    """The files of a token set, without the manifest, which names its folder."""
    tokens = ingest(request_of(files, tokenizer, folder, **changes), tasks)
    found = file_bytes(tokens.folder.path)
    return found.pop(MANIFEST_NAME) and (tokens.report, found)


@pytest.mark.parametrize(
    "changes",
    [{}, {"group_by_prompt": True, "drop_duplicates": True, "val_set_size": 0.3}],
    ids=["as they are", "regrouped"],
)
def test_ingest_on_ray_data_writes_what_one_process_writes(
    files, tokenizer_folder, tmp_path, changes
):
    """The first file in several splits; regrouped, its shards are written a second time."""
    assert len(split_file(files[0], SHARD_ROWS)) > 1
    expected = token_set(
        in_this_process.map_tasks, files, tokenizer_folder, tmp_path / "one", **changes
    )
    assert token_set(map_tasks, files, tokenizer_folder, tmp_path / "ray", **changes) == expected


class Dies:
    """Tokenizes splits; the first one that is done kills its process."""

    def __init__(self, work: TokenizeSplit, trace: Path) -> None:
        self.work, self.trace = work, trace

    def __call__(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        """Answer, from the second time on."""
        answers = self.work(item)
        if not self.trace.exists():
            self.trace.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return answers


def test_a_task_that_is_killed_is_run_again(files, tokenizer_folder, tmp_path):
    """After it wrote its shards and before it could answer."""

    def with_a_death(items: list[dict[str, Any]], work: Any) -> list[dict[str, Any]]:
        dies = isinstance(work, TokenizeSplit)
        return map_tasks(items, Dies(work, tmp_path / "trace") if dies else work)

    expected = token_set(in_this_process.map_tasks, files, tokenizer_folder, tmp_path / "one")
    assert token_set(with_a_death, files, tokenizer_folder, tmp_path / "ray") == expected
    assert (tmp_path / "trace").exists()


def test_an_error_of_a_task_is_raised_as_it_is(tokenizer_folder, tmp_path):
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(os.urandom(1000))[:-20])
    request = request_of((str(tmp_path / "torn.jsonl.gz"),), tokenizer_folder, tmp_path)
    with pytest.raises(DataError, match=r"torn\.jsonl\.gz") as caught:
        ingest(request, map_tasks)
    assert len(caught.value.lines) == 1
    assert list(tmp_path.rglob(MANIFEST_NAME)) == []
    with pytest.raises(ZeroDivisionError):
        map_tasks([{}], lambda item: 1 / 0)


class DiesAtFile:
    """A reader that one file ends the process of, each time."""

    def __call__(self, row: dict[str, str]) -> list[dict[str, str]]:
        """Answer for every other file."""
        item = json.loads(row["item"])
        paths = [path for _, path in item.get("files", ())]
        if "damaged" in " ".join([item.get("path", item.get("split", {}).get("path", "")), *paths]):
            os.kill(os.getpid(), signal.SIGSEGV)
        return [row]


@pytest.mark.slow
def test_a_file_that_ends_each_process_is_named_after_a_few_tries():
    files = ["/data/a.jsonl", "/data/damaged.arrow", "/data/b.jsonl"]
    items = [{"path": files[0]}, *({"split": {"path": file}} for file in files[1:])]
    with pytest.raises(
        DataError, match=r"/data/damaged\.arrow: the process that reads it"
    ) as error:
        map_tasks(items, DiesAtFile())
    assert len(error.value.lines) == 1


@pytest.mark.slow
def test_a_small_file_that_ends_the_process_of_many_is_named_alone():
    """Each file of the task whose process ended is tried in a task of its own."""
    files = [[i, f"/data/{'damaged' if i == 7 else i}.jsonl"] for i in range(12)]
    with pytest.raises(DataError, match=r"/data/damaged\.jsonl: the process that reads") as error:
        map_tasks([{"files": files[:5]}, {"files": files[5:]}], DiesAtFile())
    assert len(error.value.lines) == 1


def test_progress_says_rows_rate_and_the_time_left():
    """400 rows of 1 of 4 parts after 20 s: 20 rows/s, and 60 s for the other three parts."""
    progress = Progress(4)
    assert progress.text(20.0) == "reading the data: part 0 of 4"
    progress.add({"rows_read": 300}, is_last=False)
    progress.add({"rows_read": 100}, is_last=True)
    text = "reading the data: 400 rows, 20 rows/s, about 1 min 0 s left"
    assert progress.text(20.0) == text


def test_progress_logs_while_it_lasts(caplog):
    with caplog.at_level("INFO", "orpo_ray"), Progress(2, every_s=0.01) as progress:
        while not caplog.records:
            progress.add({"rows_read": 1}, is_last=False)
    n_lines = len(caplog.records)
    assert caplog.records[0].getMessage().startswith("reading the data: ")
    assert len(caplog.records) == n_lines
