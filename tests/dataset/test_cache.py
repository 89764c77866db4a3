"""What runs left behind: listed with sizes and ages, and deleted where it is old and their own."""

import os
import time
from pathlib import Path

import pytest

from orpo_ray.dataset.cache import Leftover, age_in_seconds, clear, leftovers
from orpo_ray.storage.folder import Folder
from orpo_ray.storage.scratch import copies_root

OLD, NEW = "0" * 32, "f" * 32
DAY_S = 86400


def fill(folder: Path) -> None:
    """An old token set, a new one, and what the project did not make."""
    for name, age_days in ((OLD, 40), (NEW, 1), ("notes", 90), ("0" * 31, 90)):
        (folder / name / "quarantine").mkdir(parents=True)
        for file in ("a.parquet", "quarantine/a.jsonl"):
            path = folder / name / file
            path.write_text("12345")
            os.utime(path, (time.time() - age_days * DAY_S,) * 2)
    (folder / "loose.txt").write_text("x")


def left_in(cache: Folder) -> list[Leftover]:
    """The token sets of a cache that is not in the output directory."""
    return leftovers(Folder.at("/nowhere"), cache, Folder.at("/nowhere"))


def test_token_sets_are_listed_the_oldest_first(tmp_path):
    fill(tmp_path)
    found = left_in(Folder.at(tmp_path))
    assert [(one.name, one.size_bytes, round(one.age_s / DAY_S)) for one in found] == [
        (OLD, 10, 40),
        (NEW, 10, 1),
    ]
    assert left_in(Folder.at(tmp_path / "missing")) == []


def test_only_old_token_sets_are_deleted(tmp_path):
    fill(tmp_path)
    assert [one.name for one in clear(left_in(Folder.at(tmp_path)), 30 * DAY_S)] == [OLD]
    assert {path.name for path in tmp_path.iterdir()} == {NEW, "notes", "0" * 31, "loose.txt"}


def test_a_cache_in_a_bucket_is_cleared_there(bucket):
    for name in (f"{OLD}/a.parquet", f"{OLD}/done/a.json", "notes/x"):
        bucket.put_object(Bucket="bucket", Key=f"runs/token_cache/{name}", Body=b"12345")
    cache = Folder.at("s3://bucket/runs/token_cache")
    assert [(one.name, one.size_bytes) for one in left_in(cache)] == [(OLD, 10)]
    assert clear(left_in(cache), 3600.0) == []
    assert [one.name for one in clear(left_in(cache), 0.0)] == [OLD]
    kept = bucket.list_objects_v2(Bucket="bucket", Prefix="runs/token_cache/")["Contents"]
    assert [entry["Key"] for entry in kept if entry["Size"]] == ["runs/token_cache/notes/x"]


@pytest.mark.parametrize(("text", "seconds"), [("30d", 2592000), ("12h", 43200), ("5m", 300)])
def test_ages(text, seconds):
    assert age_in_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "d", "-1d", "1w", "30d ", "1e3d"])
def test_what_is_no_age_is_refused(text):
    with pytest.raises(ValueError, match="is no age"):
        age_in_seconds(text)


def test_all_else_that_runs_leave_behind_is_named(tmp_path, monkeypatch):
    """And no data or checkpoint beside it, nor a folder of copies that others made."""
    monkeypatch.setenv("ORPO_RAY_SCRATCH", str(tmp_path / "scratch"))
    output = tmp_path / "runs"
    names = ("copied input", "damaged checkpoint", "damaged checkpoint")
    mine = (
        f"inputs/{'a' * 16}.parquet",
        "first/checkpoints/set-aside/step-00000004/MANIFEST.json",
        "sweep/trials/t0/checkpoints/set-aside/REASON",
    )
    kept = ("first/checkpoints/step-00000004/MANIFEST.json", "inputs/mine.parquet", "first/run.log")
    for name in (*mine, *kept):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("12345")
    copies = Folder.at("s3://bucket/runs/first").make()
    (copies.path / "metrics.jsonl").write_text("12345")
    os.utime(copies.path / "metrics.jsonl", (0, 0))  # as it is in the bucket
    arguments = Folder.at(output), Folder.at(output / "token_cache"), Folder(copies_root())
    found = leftovers(*arguments)
    assert tuple(one.kind for one in found) == (*names, "copy of a bucket")
    assert found[-1].name == "driver/s3/bucket"
    assert clear(found, 60.0) == []
    clear(found, 0.0)
    assert leftovers(*arguments) == []
    assert all((output / name).exists() for name in kept)
    others = tmp_path / "others" / "driver" / "s3" / "bucket"
    others.mkdir(parents=True)
    (others / "thesis").touch()
    assert leftovers(*arguments[:2], Folder(tmp_path / "others")) == []


def test_prepare_lists_and_clears_without_preparing(run_here, tmp_path, monkeypatch):
    monkeypatch.setenv("ORPO_RAY_SCRATCH", str(tmp_path / "scratch"))
    fill(tmp_path / "runs" / "token_cache")
    done = run_here(tmp_path, "jobs/prepare.py", "--list-cache")
    assert (done.returncode, done.stdout.count(" MB")) == (0, 3)
    done = run_here(tmp_path, "jobs/prepare.py", "--clear-cache", "older_than=30d")
    assert OLD in done.stdout
    assert "1 of 0.0 MB deleted" in done.stdout
    assert not (tmp_path / "runs" / "token_cache" / OLD).exists()
    done = run_here(tmp_path, "jobs/prepare.py", "--clear-cache", "tomorrow")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
