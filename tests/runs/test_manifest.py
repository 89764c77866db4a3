"""The commit point: what is not byte for byte as it was committed is not gone on from."""

import json
from pathlib import Path

import pytest
import xxhash

from orpo_ray.runs.manifest import (
    FORMAT,
    MANIFEST,
    NewerCheckpointError,
    checkpoint_directory,
    find_damage,
    fingerprint,
    keep_newest,
    newest_checkpoint,
    read_manifest,
    write_manifest,
)
from orpo_ray.runs.resume import newest_manifest
from orpo_ray.storage.folder import Folder


def commit(run: Path, step: int, content: bytes = b"tensors") -> Path:
    directory = checkpoint_directory(run, step)
    directory.mkdir(parents=True)
    (directory / "__0_0.distcp").write_bytes(content)
    files = {"__0_0.distcp": fingerprint(directory / "__0_0.distcp")}
    write_manifest(
        Folder.at(directory), {"step": step, "epoch": 1, "settings": {"beta": 0.1}}, files
    )
    return directory


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize("name", [MANIFEST, "__0_0.distcp"])
def test_every_flipped_bit_of_every_file_is_found(tmp_path, name):
    directory = commit(tmp_path, 7)
    path = directory / name
    assert find_damage(Folder.at(directory)) is None
    for bit in range(8 * path.stat().st_size):
        flip(path, bit)
        assert find_damage(Folder.at(directory)) is not None, f"bit {bit} of {name}"
        flip(path, bit)
    assert find_damage(Folder.at(directory)) is None


def test_what_is_wrong_is_said(tmp_path):
    directory = commit(tmp_path, 7)
    (directory / "__0_0.distcp").write_bytes(b"tens")
    assert find_damage(Folder.at(directory)) == "__0_0.distcp has 4 bytes instead of 7"
    (directory / "__0_0.distcp").unlink()
    assert find_damage(Folder.at(directory)) == "__0_0.distcp is missing"
    (directory / MANIFEST).write_text("")
    assert find_damage(Folder.at(directory)) == "its MANIFEST.json is damaged"
    (directory / MANIFEST).unlink()
    assert find_damage(Folder.at(directory)) == "it has no MANIFEST.json, so its save never ended"


def test_the_newest_that_verifies_is_found_and_the_others_are_set_aside(tmp_path):
    for step in (7, 14, 21, 28):
        commit(tmp_path, step)
    (checkpoint_directory(tmp_path, 28) / MANIFEST).unlink()
    flip(checkpoint_directory(tmp_path, 21) / "__0_0.distcp", 3)
    said = []
    assert newest_checkpoint(Folder.at(tmp_path), lambda *what: said.append(what)) == 14
    assert said == [
        ("step-00000028", "it has no MANIFEST.json, so its save never ended"),
        ("step-00000021", "__0_0.distcp does not match its checksum"),
    ]
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["set-aside", "step-00000007", "step-00000014"]
    reason = (tmp_path / "checkpoints" / "set-aside" / "REASON").read_text()
    assert reason == "step-00000021: __0_0.distcp does not match its checksum\n"


def test_no_checkpoint_is_none(tmp_path):
    assert newest_checkpoint(Folder.at(tmp_path), lambda name, reason: None) is None


def test_the_newest_stay_and_half_deleted_ones_go(tmp_path):
    for step in (7, 14, 21, 28):
        commit(tmp_path, step)
    (checkpoint_directory(tmp_path, 7) / MANIFEST).unlink()
    keep_newest(Folder.at(tmp_path), None)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4
    keep_newest(Folder.at(tmp_path), 2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000021", "step-00000028"]
    assert read_manifest(checkpoint_directory(tmp_path, 28))["step"] == 28


@pytest.mark.parametrize(
    ("limit", "ranking", "kept"),
    [
        (2, (7, 14), (7, 28)),
        (2, (21, 7), (21, 28)),
        (3, (14,), (14, 21, 28)),
        (3, (7,), (7, 21, 28)),
        (1, (7,), (7, 28)),
        (1, (28, 7), (28,)),
        (2, (8, 10, 14, 7), (14, 28)),
        (2, (8,), (21, 28)),
    ],
)
def test_the_best_that_has_a_checkpoint_stays_among_the_newest(tmp_path, limit, ranking, kept):
    for step in (7, 14, 21, 28):
        commit(tmp_path, step)
    checkpoint_directory(tmp_path, 8).mkdir()  # its save never ended
    keep_newest(Folder.at(tmp_path), limit, ranking)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in kept]


@pytest.mark.parametrize("name", [".metadata", "__1_0.distcp"])
def test_what_torch_would_unpickle_has_to_be_covered(tmp_path, name):
    directory = commit(tmp_path, 7)
    (directory / "notes.txt").write_text("of a person")
    assert find_damage(Folder.at(directory)) is None
    (directory / name).write_bytes(b"planted")
    assert find_damage(Folder.at(directory)) == f"{name} is not in its MANIFEST.json"


def with_format(directory: Path, number: int) -> None:
    """The checkpoint as a version with another format would commit it."""
    content = read_manifest(directory)
    write_manifest(Folder.at(directory), content | {"format": number}, content["files"])


def test_a_checkpoint_of_a_later_format_is_named_and_not_set_aside(tmp_path):
    """It is no damage: the version that wrote it reads it."""
    directory = commit(tmp_path, 7)
    assert read_manifest(directory)["format"] == FORMAT
    with_format(directory, FORMAT + 1)
    for read in (
        lambda: newest_checkpoint(Folder.at(tmp_path), lambda *_: None),
        lambda: newest_manifest(tmp_path),
    ):
        with pytest.raises(NewerCheckpointError, match=rf"MANIFEST.json is of format {FORMAT + 1}"):
            read()
    assert directory.exists()


def test_a_checkpoint_without_a_format_is_of_the_first(tmp_path):
    directory = commit(tmp_path, 7)
    text = (directory / MANIFEST).read_text()
    content = json.loads(text)["content"]
    del content["format"]
    seal = xxhash.xxh3_128_hexdigest(json.dumps(content, indent=1).encode())
    (directory / MANIFEST).write_text(json.dumps({"content": content, "xxh3_128": seal}, indent=1))
    assert newest_checkpoint(Folder.at(tmp_path), lambda *_: None) == 7
