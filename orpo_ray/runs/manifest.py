"""The commit point of a checkpoint: the manifest that covers every byte of it.

Runs in training workers and on the driver; needs no torch.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from orpo_ray.storage.folder import Folder

MANIFEST = "MANIFEST.json"
FOLDER = "checkpoints"
SET_ASIDE = "set-aside"
# Of all that is in a checkpoint; increased whenever this version could not read an older one, or
# an older version this one. The seal and the key `format` are the same in all.
FORMAT = 1


class NewerCheckpointError(Exception):
    """A checkpoint is whole, and of a format that only a later version reads."""


def checkpoint_directory(run_directory: str | os.PathLike[str], step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return Path(run_directory, FOLDER, f"step-{step:08d}")


def checkpoint_directories(run_directory: str | os.PathLike[str]) -> list[Path]:
    """Folders of all checkpoints, committed or not; the newest first."""
    return sorted(Path(run_directory, FOLDER).glob("step-*"), reverse=True)


def checkpoint(run: Folder, step: int) -> Folder:
    """The checkpoint of a step as a folder of its run."""
    return run / FOLDER / checkpoint_directory(run, step).name


def checkpoints(run: Folder) -> list[Folder]:
    """All checkpoints, committed or not, as folders of their run; the newest first."""
    return [run / FOLDER / path.name for path in checkpoint_directories(run)]


def write_manifest(checkpoint: Folder, about: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    """Commit a checkpoint whose other files are written.

    Args:
        checkpoint: what is of it in other places has to be published.
        about: other content of the manifest (step, epoch, position, world size, settings).
        files: `fingerprint` of every file by name.
    """
    checkpoint.write_text(
        MANIFEST, _text(_sealed({"format": FORMAT, **about, "files": dict(files)}))
    )


def read_manifest(directory: Path) -> dict[str, Any]:
    """The content of a checkpoint's manifest.

    Raises:
        ValueError: when it is missing or not byte for byte as it was written; the text says which.
        NewerCheckpointError: naming it. One without a format is of the first.
    """
    try:
        text = (directory / MANIFEST).read_text(encoding="utf-8")
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
    if content.get("format", FORMAT) > FORMAT:
        raise NewerCheckpointError(
            f"{directory / MANIFEST} is of format {content['format']}, and this version "
            f"reads {FORMAT}: resume with the version that wrote it, or choose another run_name"
        )
    return content


def find_damage(checkpoint: Folder, read_files: bool = True) -> str | None:
    """Compare a checkpoint with its manifest; returns the first difference, or None.

    Args:
        checkpoint: a copy of one is compared with the sizes that the bucket has.
        read_files: False compares only the sizes of the files that the manifest names, at once.
    """
    try:
        files = read_manifest(checkpoint.path)["files"]
    except ValueError as error:
        return str(error)
    there = checkpoint.sizes()
    for name in sorted(there):
        # Files that torch would unpickle have to be covered.
        if name not in files and (name == ".metadata" or name.endswith(".distcp")):
            return f"{name} is not in its {MANIFEST}"
    for name, entry in files.items():
        if name not in there:
            return f"{name} is missing"
        if there[name] != entry["bytes"]:
            return f"{name} has {there[name]} bytes instead of {entry['bytes']}"
        if read_files and fingerprint(checkpoint.path / name) != entry:
            return f"{name} does not match its checksum"
    return None


def newest_checkpoint(run: Folder, set_aside: Callable[[str, str], None]) -> int | None:
    """The step of the newest checkpoint that verifies, or None.

    One that does not verify is moved to `checkpoints/set-aside/`, which keeps the last such one.

    Args:
        run: the run directory.
        set_aside: called with the name of each checkpoint that was moved, and the reason.
    """
    for checkpoint in checkpoints(run):
        if not checkpoint.fetch().path.exists():
            continue  # a copy of one that was deleted
        damage = find_damage(checkpoint)
        if damage is not None and checkpoint.url is not None:  # perhaps of the copy alone
            damage = find_damage(checkpoint.fetch_again())
        if damage is None:
            return int(checkpoint.name.removeprefix("step-"))
        aside = run / FOLDER / SET_ASIDE
        aside.remove()
        aside.path.mkdir()
        (run / FOLDER).rename(checkpoint.name, f"{SET_ASIDE}/{checkpoint.name}")
        aside.write_text("REASON", f"{checkpoint.name}: {damage}\n")
        set_aside(checkpoint.name, damage)
    return None


def keep_newest(run: Folder, limit: int | None, ranking: Sequence[int] = ()) -> None:
    """Delete all checkpoints but the newest `limit`; called when the newest was just committed.

    Args:
        run: the run directory.
        limit: None deletes none.
        ranking: steps, the best first: the first of them that has a checkpoint is one of those
            that stay, and as in transformers a second one where `limit` is 1.
    """
    if limit is None:
        return
    there = checkpoints(run)
    names = {c.name for c in there if (c.path / MANIFEST).exists()}
    ranked = (checkpoint_directory(run, step).name for step in ranking)
    best = next((name for name in ranked if name in names), None)
    kept = [checkpoint.name for checkpoint in there[:limit]]
    if best is not None and best not in kept:
        kept = [*kept[: max(1, limit - 1)], best]
    for checkpoint in there:
        if checkpoint.name not in kept:
            checkpoint.remove(MANIFEST)  # from here on it is none
            checkpoint.remove()


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
