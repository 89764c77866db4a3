"""Copies of folders in a bucket, against a real S3-compatible server on this machine."""

import os
import time
from pathlib import Path

import pytest

from orpo_ray.storage.bucket import (
    DRIVER,
    VIEWS,
    WORKERS,
    address,
    is_copy,
    local,
    make_folder,
    of_side,
)
from orpo_ray.storage.mirror import (
    age_s,
    everything,
    fetch,
    fetch_folder,
    fetch_once,
    kept_in_step,
    light,
    publish,
    remove,
    rename,
    sizes,
)


@pytest.fixture
def folder(bucket, request) -> Path:
    """The driver's copy of a folder that is this test's own."""
    path = local(f"s3://bucket/{request.node.name}/run")
    make_folder(path)
    return path


def keys(bucket, folder: Path) -> dict[str, bytes]:
    """What the server has below a folder."""
    prefix = address(folder).removeprefix("s3://bucket/") + "/"
    found = bucket.list_objects_v2(Bucket="bucket", Prefix=prefix).get("Contents", ())
    return {
        entry["Key"].removeprefix(prefix): bucket.get_object(Bucket="bucket", Key=entry["Key"])[
            "Body"
        ].read()
        for entry in found
        if not entry["Key"].endswith("/")
    }


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_path_of_a_disk_is_its_own_storage(tmp_path):
    file = write(tmp_path / "run" / "a", "1")
    assert local(str(tmp_path)) == tmp_path
    assert address(file) == str(file)
    assert not is_copy(file)
    assert of_side(file, WORKERS) == file
    publish(file)
    assert fetch(file) == file
    assert fetch_folder(tmp_path / "missing") == tmp_path / "missing"
    assert not (tmp_path / "missing").exists()
    assert sizes(tmp_path / "run") == {"a": 1}
    rename(file, tmp_path / "run" / "b")
    remove(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_copy_knows_what_it_is_of(folder):
    """Driver, workers and whoever looks have paths of their own for one URL."""
    url = "s3://bucket/test_a_copy_knows_what_it_is_of/run"
    assert address(folder) == url
    for side in (DRIVER, WORKERS, VIEWS):
        assert of_side(folder, side) == local(url, side)
        assert address(of_side(folder, side)) == url
    assert len({of_side(folder, side) for side in (DRIVER, WORKERS, VIEWS)}) == 3
    root = folder.parents[4]
    assert root.name == "orpo_ray-copies"
    assert root.stat().st_mode & 0o777 == 0o700


def test_what_one_publishes_another_fetches(bucket, folder):
    theirs = of_side(folder, WORKERS)
    write(folder / "a", "one")
    write(folder / "deep" / "b.safetensors", "two")
    write(folder / "c.tmp", "half")
    publish(folder)
    assert keys(bucket, folder) == {"a": b"one", "deep/b.safetensors": b"two"}
    fetch_folder(theirs, light)
    assert [path.name for path in theirs.rglob("*") if path.is_file()] == ["a"]
    fetch_folder(theirs)
    assert (theirs / "deep" / "b.safetensors").read_text() == "two"
    publish(write(theirs / "a", "three"))
    assert fetch(folder / "a").read_text() == "three"
    assert fetch_once(folder / "a").read_text() == "three"


def test_a_copy_becomes_what_the_bucket_has(folder):
    """What others deleted goes; what is not asked about stays."""
    theirs = of_side(folder, WORKERS)
    for name in ("kept", "gone", "large.distcp"):
        publish(write(folder / name, name))
    fetch_folder(theirs)
    remove(folder / "gone")
    remove(folder / "large.distcp")
    fetch_folder(theirs, light)
    assert sorted(path.name for path in theirs.iterdir()) == ["kept", "large.distcp"]
    assert sizes(theirs) == {"kept": 4}
    assert not fetch(theirs / "gone").exists()
    remove(folder)
    assert not fetch_folder(theirs).exists()


def test_a_file_that_is_the_same_is_not_fetched_again(folder):
    """By size and the server's time of it: a copy that was changed by hand is brought back."""
    publish(write(folder / "a", "one"))
    before = (folder / "a").stat().st_ino
    fetch_folder(folder)
    assert (folder / "a").stat().st_ino == before
    write(folder / "a", "two")
    fetch_folder(folder)
    assert (folder / "a").read_text() == "one"


def test_folders_and_files_are_moved(bucket, folder):
    publish(write(folder / "from" / "a", "1"), write(folder / "from" / "b" / "c", "2"))
    rename(folder / "from", folder / "to")
    assert keys(bucket, folder) == {"to/a": b"1", "to/b/c": b"2"}
    rename(folder / "to" / "a", folder / "d")
    assert keys(bucket, folder) == {"d": b"1", "to/b/c": b"2"}
    assert (folder / "d").read_text() == "1"


def test_both_sides_keep_up_with_each_other(bucket, folder):
    """Each publishes its own files only; the last round comes when a side ends."""
    theirs = of_side(folder, WORKERS)
    make_folder(theirs)
    asks, answers = {"ask"}.__contains__, {"answer"}.__contains__
    with kept_in_step(folder, asks, answers), kept_in_step(theirs, answers, asks):
        write(folder / "ask", "?")
        write(folder / "mine", "not to be seen")
        until = time.monotonic() + 30
        while not (theirs / "ask").exists() and time.monotonic() < until:
            time.sleep(0.1)
        assert (theirs / "ask").read_text() == "?"
        with (theirs / "answer").open("a") as file:
            for line in range(1000):
                file.write(f"{line}\n")
    assert (folder / "answer").read_text().splitlines() == [str(n) for n in range(1000)]
    assert set(keys(bucket, folder)) == {"ask", "answer"}


def test_an_error_inside_is_the_one_that_is_raised(bucket, folder):
    """And what was written until then is in the bucket."""

    def fail() -> None:
        with kept_in_step(folder, everything, everything):
            write(folder / "a", "1")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert keys(bucket, folder) == {"a": b"1"}


def test_the_age_of_a_file_is_by_the_buckets_clock(bucket, folder):
    """The server tells whole seconds."""
    assert age_s(folder / "a") is None
    publish(write(folder / "a", "1"))
    os.utime(folder / "a", (0, 0))
    assert 0 <= age_s(folder / "a") <= 10
    assert set(keys(bucket, folder)) == {"a"}


def test_a_bucket_that_is_not_there_is_an_error(bucket):
    with pytest.raises(OSError, match="nowhere"):
        publish(write(local("s3://nowhere/a"), "1"))
