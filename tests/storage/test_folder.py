"""Copies of folders in a bucket, against a real S3-compatible server on this machine."""

import os
import pickle
import threading
import time

import pytest

from orpo_ray.storage.folder import DRIVER, VIEWS, WORKERS, Folder, everything, light


@pytest.fixture
def folder(bucket, request) -> Folder:
    """The driver's copy of a folder that is this test's own."""
    return Folder.at(f"s3://bucket/{request.node.name}/run").make()


def keys(bucket, folder: Folder) -> dict[str, bytes]:
    """What the server has below a folder."""
    prefix = folder.address.removeprefix("s3://bucket/") + "/"
    found = bucket.list_objects_v2(Bucket="bucket", Prefix=prefix).get("Contents", ())
    return {
        entry["Key"].removeprefix(prefix): bucket.get_object(Bucket="bucket", Key=entry["Key"])[
            "Body"
        ].read()
        for entry in found
        if not entry["Key"].endswith("/")
    }


def write(folder: Folder, name: str, text: str) -> str:
    path = folder.path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return name


def test_a_folder_of_a_disk_is_its_own_storage(tmp_path):
    folder = Folder.at(tmp_path / "run")
    assert Folder.at(str(tmp_path)).path == tmp_path
    assert folder.url is None
    assert folder.on(WORKERS) is Folder.at(folder) is folder
    assert folder.make().write_text("a", "1") == tmp_path / "run" / "a"
    assert (folder.address, f"{folder}", os.fspath(folder)) == (str(tmp_path / "run"),) * 3
    folder.publish("a")
    folder.publish_all()
    assert folder.fetch_file("a").read_text() == "1"
    assert not (folder / "missing").fetch().path.exists()
    assert folder.fetch_again().sizes() == {"a": 1}
    folder.rename("a", "b")
    folder.forget_heavy()
    folder.parent.remove("run")
    assert list(tmp_path.iterdir()) == []


def test_a_copy_knows_what_it_is_of(folder):
    """Driver, workers and whoever looks have folders of their own for one URL."""
    url = "s3://bucket/test_a_copy_knows_what_it_is_of/run"
    assert folder.address == url
    for side in (DRIVER, WORKERS, VIEWS):
        assert folder.on(side) == Folder.at(url, side)
        assert folder.on(side).address == url
    assert len({folder.on(side) for side in (DRIVER, WORKERS, VIEWS)}) == 3
    assert (folder / "a" / "b").address == f"{url}/a/b"
    assert (folder / "a" / "b").path == folder.path / "a" / "b"
    assert (folder / "a").parent == folder
    root = folder.path.parents[4]
    assert root.name == "orpo_ray-copies"
    assert root.stat().st_mode & 0o777 == 0o700


def test_the_name_of_a_folder_means_nothing(bucket, folder):
    """What lies among the copies is one only where it was opened by its URL."""
    on_disk = Folder.at(folder.path)
    on_disk.write_text("a", "1")
    assert on_disk.url is None
    assert keys(bucket, folder) == {}


def test_where_copies_lie_travels_with_a_folder(folder, monkeypatch, tmp_path):
    """The driver decides, whatever the environment of another process says."""
    folder._uploading[folder.path] = threading.Lock()
    sent = pickle.dumps(folder / "a")
    monkeypatch.setenv("ORPO_RAY_SCRATCH", str(tmp_path))
    there = pickle.loads(sent)
    assert (there, there.path) == (folder / "a", folder.path / "a")
    assert there.make().parent == folder


def test_another_users_copies_are_refused(bucket, monkeypatch, tmp_path):
    (tmp_path / "orpo_ray-copies").mkdir()
    monkeypatch.setenv("ORPO_RAY_SCRATCH", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    for use in (Folder.make, Folder.fetch, lambda folder: folder.fetch_file("a")):
        with pytest.raises(PermissionError, match="is another user's; set ORPO_RAY_SCRATCH"):
            use(Folder.at("s3://bucket/runs"))


def test_what_one_publishes_another_fetches(bucket, folder):
    theirs = folder.on(WORKERS)
    write(folder, "a", "one")
    write(folder, "deep/b.safetensors", "two")
    write(folder, "c.tmp", "half")
    folder.publish_all()
    assert keys(bucket, folder) == {"a": b"one", "deep/b.safetensors": b"two"}
    theirs.fetch(light)
    assert [path.name for path in theirs.path.rglob("*") if path.is_file()] == ["a"]
    theirs.fetch()
    assert (theirs.path / "deep" / "b.safetensors").read_text() == "two"
    theirs.publish(write(theirs, "a", "three"))
    assert folder.fetch_file("a", once=True).read_text() == "one"
    assert folder.fetch_file("a").read_text() == "three"


def test_what_is_written_is_published(bucket, folder):
    folder.write_text("a", "one")
    folder.write_json("b.json", {"c": 1})
    with folder.replacing("d") as path:
        path.write_bytes(b"two")
        assert set(keys(bucket, folder)) == {"a", "b.json"}
    assert keys(bucket, folder) == {"a": b"one", "b.json": b'{"c": 1}\n', "d": b"two"}
    assert folder.on(WORKERS).read_json("b.json") == {"c": 1}
    assert folder.on(WORKERS).read_json("none.json") == {}
    folder.publish()
    assert len(keys(bucket, folder)) == 3


def test_a_copy_becomes_what_the_bucket_has(folder):
    """What others deleted goes; what is not asked about stays."""
    theirs = folder.on(WORKERS)
    for name in ("kept", "gone", "large.distcp"):
        folder.write_text(name, name)
    theirs.fetch()
    folder.remove("gone")
    folder.remove("large.distcp")
    theirs.fetch(light)
    assert sorted(path.name for path in theirs.path.iterdir()) == ["kept", "large.distcp"]
    assert theirs.sizes() == {"kept": 4}
    assert not theirs.fetch_file("gone").exists()
    folder.remove()
    assert not theirs.fetch().path.exists()


def test_a_file_that_is_the_same_is_not_fetched_again(folder):
    """By size and the server's time of it: a copy that was changed by hand is brought back."""
    path = folder.write_text("a", "one")
    before = path.stat().st_ino
    folder.fetch()
    assert path.stat().st_ino == before
    write(folder, "a", "two")
    folder.fetch()
    assert path.read_text() == "one"
    times = path.stat()
    write(folder, "a", "two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert folder.fetch().path.joinpath("a").read_text() == "two"
    assert folder.fetch_again().path.joinpath("a").read_text() == "one"


def test_folders_and_files_are_moved(bucket, folder):
    folder.publish(write(folder, "from/a", "1"), write(folder, "from/b/c", "2"))
    folder.rename("from", "to")
    assert keys(bucket, folder) == {"to/a": b"1", "to/b/c": b"2"}
    folder.rename("to/a", "d")
    assert keys(bucket, folder) == {"d": b"1", "to/b/c": b"2"}
    assert (folder.path / "d").read_text() == "1"


@pytest.mark.long
def test_both_sides_keep_up_with_each_other(bucket, folder):
    """Each publishes its own files only; the last round comes when a side ends."""
    theirs = folder.on(WORKERS).make()
    asks, answers = {"ask"}.__contains__, {"answer"}.__contains__
    with folder.kept_in_step(asks, answers), theirs.kept_in_step(answers, asks):
        write(folder, "ask", "?")
        write(folder, "mine", "not to be seen")
        until = time.monotonic() + 30
        while not (theirs.path / "ask").exists() and time.monotonic() < until:
            time.sleep(0.1)
        assert (theirs.path / "ask").read_text() == "?"
        with (theirs.path / "answer").open("a") as file:
            for line in range(1000):
                file.write(f"{line}\n")
    answer = (folder.path / "answer").read_text()
    assert answer.splitlines() == [str(n) for n in range(1000)]
    assert set(keys(bucket, folder)) == {"ask", "answer"}


def test_an_error_inside_is_the_one_that_is_raised(bucket, folder):
    """And what was written until then is in the bucket."""

    def fail() -> None:
        with folder.kept_in_step(everything, everything):
            write(folder, "a", "1")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert keys(bucket, folder) == {"a": b"1"}


def test_the_age_of_a_file_is_by_the_buckets_clock(bucket, folder):
    """The server tells whole seconds."""
    assert folder.age_s("a") is None
    os.utime(folder.write_text("a", "1"), (0, 0))
    assert 0 <= folder.age_s("a") <= 10
    assert set(keys(bucket, folder)) == {"a"}


def test_a_bucket_that_is_not_there_is_an_error(bucket):
    with pytest.raises(OSError, match="nowhere"):
        Folder.at("s3://nowhere/a").make().write_text("b", "1")
