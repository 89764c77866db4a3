"""The commit point of a checkpoint: the manifest that covers every byte of it.

Runs in training workers and on the driver; needs no torch.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from orpo_ray.storage.bucket import is_copy
from orpo_ray.storage.files import write_atomic
from orpo_ray.storage.mirror import fetch_folder, publish, remove, rename, sizes

MANIFEST = "MANIFEST.json"
FOLDER = "checkpoints"
SET_ASIDE = "set-aside"


def checkpoint_directory(run_directory: str | Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return Path(run_directory, FOLDER, f"step-{step:08d}")


def checkpoint_directories(run_directory: str | Path) -> list[Path]:
    """Folders of all checkpoints, committed or not; the newest first."""
    return sorted(Path(run_directory, FOLDER).glob("step-*"), reverse=True)


def write_manifest(directory: Path, about: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    """Commit a checkpoint whose other files are written.

    Args:
        directory: of the checkpoint; what is of it in other places has to be published.
        about: other content of the manifest (step, epoch, position, world size, settings).
        files: `fingerprint` of every file by name.
    """
    write_atomic(directory / MANIFEST, _text(_sealed({**about, "files": dict(files)})))
    publish(directory / MANIFEST)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The content of a checkpoint's manifest.

    Raises:
        ValueError: when it is missing or not byte for byte as it was written; the text says which.
    """
    try:
        text = (directory / MANIFEST).read_text()
    except FileNotFoundError:
        raise ValueError(f"it has no {MANIFEST}, so its save never ended") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"its {MANIFEST} cannot be read: {error}") from error
    try:
        content: dict[str, Any] = json.loads(text)["content"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"its {MANIFEST} is damaged") from None
    if text != _text(_sealed(content)):
        raise ValueError(f"its {MANIFEST} is damaged")
    return content


def find_damage(directory: Path, read_files: bool = True) -> str | None:
    """Compare a checkpoint with its manifest; returns the first difference, or None.

    Args:
        directory: of the checkpoint.
        read_files: False compares only the sizes of the files that the manifest names, at once.
    """
    try:
        files = read_manifest(directory)["files"]
    except ValueError as error:
        return str(error)
    there = sizes(directory)
    for name in sorted(there):
        # Files that torch would unpickle have to be covered.
        if name not in files and (name == ".metadata" or name.endswith(".distcp")):
            return f"{name} is not in its {MANIFEST}"
    for name, entry in files.items():
        if name not in there:
            return f"{name} is missing"
        if there[name] != entry["bytes"]:
            return f"{name} has {there[name]} bytes instead of {entry['bytes']}"
        if read_files and fingerprint(directory / name) != entry:
            return f"{name} does not match its checksum"
    return None


def newest_checkpoint(run_directory: str, set_aside: Callable[[str, str], None]) -> int | None:
    """The step of the newest checkpoint that verifies, or None.

    One that does not verify is moved to `checkpoints/set-aside/`, which keeps the last such one.

    Args:
        run_directory: of the run.
        set_aside: called with the name of each checkpoint that was moved, and the reason.
    """
    for directory in checkpoint_directories(run_directory):
        if not fetch_folder(directory).exists():
            continue  # a copy of one that was deleted
        damage = find_damage(directory)
        if damage is not None and is_copy(directory):  # perhaps of the copy alone
            shutil.rmtree(directory)
            fetch_folder(directory)
            damage = find_damage(directory)
        if damage is None:
            return int(directory.name.removeprefix("step-"))
        aside = directory.parent / SET_ASIDE
        remove(aside)
        aside.mkdir()
        rename(directory, aside / directory.name)
        (aside / "REASON").write_text(f"{directory.name}: {damage}\n")
        publish(aside / "REASON")
        set_aside(directory.name, damage)
    return None


def keep_newest(run_directory: str, limit: int | None, ranking: Sequence[int] = ()) -> None:
    """Delete all checkpoints but the newest `limit`; called when the newest was just committed.

    Args:
        run_directory: of the run.
        limit: None deletes none.
        ranking: steps, the best first: the first of them that has a checkpoint is one of those
            that stay, and as in transformers a second one where `limit` is 1.
    """
    if limit is None:
        return
    directories = checkpoint_directories(run_directory)
    ranked = (checkpoint_directory(run_directory, step) for step in ranking)
    best = next((directory for directory in ranked if (directory / MANIFEST).exists()), None)
    kept = directories[:limit]
    if best is not None and best not in kept:
        kept = [*directories[: max(1, limit - 1)], best]
    for directory in directories:
        if directory in kept:
            continue
        remove(directory / MANIFEST)  # from here on it is none
        remove(directory)


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and XXH3-128 of a file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"bytes": path.stat().st_size, "xxh3_128": digest.hexdigest()}


def _sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with its own checksum, so that a flipped bit in it is found as well."""
    return {"content": content, "xxh3_128": xxhash.xxh3_128_hexdigest(_text(content).encode())}


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1)
