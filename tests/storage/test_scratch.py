"""The folder of copies is this user's alone, level by level, and nothing else is deleted there."""

import os
import tempfile
from pathlib import Path

import pytest

from orpo_ray.storage.folder import Folder
from orpo_ray.storage.scratch import copies_root, make_own


@pytest.fixture
def scratch(tmp_path, monkeypatch) -> Path:
    """The scratch folder as a user names it."""
    monkeypatch.setenv("ORPO_RAY_SCRATCH", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


@pytest.fixture
def default_scratch(tmp_path, monkeypatch) -> Path:
    """The scratch folder that is taken where the user names none; it is not there yet."""
    monkeypatch.delenv("ORPO_RAY_SCRATCH", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"orpo_ray-{os.getuid()}"


def test_each_level_is_for_this_user_alone(scratch, default_scratch, monkeypatch):
    monkeypatch.setenv("ORPO_RAY_SCRATCH", str(scratch))
    umask = os.umask(0)
    try:
        Folder.at("s3://bucket/runs/first").make()
        monkeypatch.delenv("ORPO_RAY_SCRATCH")
        Folder.at("s3://bucket/runs/first").make()
    finally:
        os.umask(umask)
    levels = [path for root in (scratch, default_scratch) for path in root.rglob("*")]
    assert len([level for level in levels if level.name == "first"]) == 2
    for level in [default_scratch, *levels]:
        assert level.stat().st_mode & 0o077 == 0, level


def test_a_default_scratch_folder_of_another_user_is_refused(default_scratch, monkeypatch):
    default_scratch.mkdir()
    copy = Folder.at("s3://bucket/run")
    # As root the folder is given away; everyone else only seems to be someone else.
    if os.getuid() == 0:
        os.chown(default_scratch, 65534, 65534)
    else:
        own = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: own + 1)
        copy = Folder(copy.path, copy.url, copies_root())
        default_scratch.rename(default_scratch.with_name(f"orpo_ray-{own + 1}"))
    with pytest.raises(PermissionError, match="is another user's"):
        copy.make()


def test_a_link_at_the_default_scratch_folder_is_refused(default_scratch, tmp_path):
    (tmp_path / "thesis").mkdir()
    default_scratch.symlink_to(tmp_path / "thesis")
    with pytest.raises(PermissionError, match="is a link"):
        Folder.at("s3://bucket/run").make()
    assert list((tmp_path / "thesis").iterdir()) == []


def test_a_scratch_folder_that_others_could_write_to_is_refused(default_scratch):
    default_scratch.mkdir()
    default_scratch.chmod(0o777)
    with pytest.raises(PermissionError, match="others may write to"):
        Folder.at("s3://bucket/run").make()


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_a_link_at_any_level_is_neither_followed_nor_emptied(bucket, scratch, tmp_path, depth):
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "draft.txt").write_text("years of work")
    make_own(copies_root(), copies_root())
    levels = ["driver", "s3", "bucket", "empty"]
    linked = copies_root().joinpath(*levels[:depth])
    linked.parent.mkdir(parents=True, exist_ok=True)
    linked.symlink_to(thesis)
    copy = Folder.at("s3://bucket/empty")
    for use in (copy.fetch, copy.fetch_again, copy.make, lambda: copy.fetch_file("a")):
        with pytest.raises(PermissionError, match="is a link"):
            use()
    if depth < 4:
        with pytest.raises(PermissionError, match="is a link"):
            copy.remove()
    assert (thesis / "draft.txt").exists()


def test_files_that_the_project_did_not_make_are_not_deleted(bucket, scratch):
    theirs = scratch / "orpo_ray-copies" / "driver" / "s3" / "bucket" / "empty" / "draft.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("years of work")
    copy = Folder.at("s3://bucket/empty")
    for use in (copy.fetch, copy.fetch_again, copy.remove):
        with pytest.raises(PermissionError, match="orpo_ray did not make"):
            use()
    assert theirs.read_text() == "years of work"


def test_a_level_that_is_a_file_is_named(scratch):
    scratch.mkdir()
    (scratch / "orpo_ray-copies").write_text("")
    with pytest.raises(NotADirectoryError, match="orpo_ray-copies is no folder"):
        Folder.at("s3://bucket/run").make()
