"""Folders written by `datasets.save_to_disk`, whose `state.json` lists the files of the rows."""

import json
import os
from collections.abc import Callable, Container, Iterable
from typing import Any

from orpo_ray.preference.errors import DataError

STATE, _SPLITS = "state.json", "dataset_dict.json"


def refuse_saved_splits(prefix: str, names: Container[str], open_in: Callable[[str], Any]) -> None:
    """Refuse a folder that holds several splits, each in a folder of its own.

    Raises:
        DataError: naming the splits.
    """
    splits = _content(_SPLITS, open_in).get("splits") if _SPLITS in names else None
    if isinstance(splits, list) and len(splits) > 1:
        shown = ", ".join(_printable(split) for split in splits)
        raise DataError(
            [
                f"{prefix.rstrip('/')}: contains the splits {shown}; give the folder of one, such "
                f"as {prefix}{_printable(splits[0])}"
            ]
        )


def names_in_saved_folders(
    prefix: str, names: Iterable[str], open_in: Callable[[str], Any]
) -> dict[str, list[str]]:
    """List the files of every saved folder in the order of their rows.

    A downloaded folder cannot have other files read: a name must be that of a file in the folder.

    Args:
        prefix: the folder that is searched, with a `/` at its end.
        names: of all files below it.
        open_in: opens one of them.

    Returns:
        By folder ("" or ending in `/`) the names after `prefix`.

    Raises:
        DataError: for a `state.json` that lists anything but files of its folder.
    """
    saved: dict[str, list[str]] = {}
    below = dict.fromkeys(names)
    for state in below:
        folder, _, base = state.rpartition("/")
        if base != STATE:
            continue
        content = _content(state, open_in)
        if "_data_files" not in content:
            continue
        head = f"{folder}/" if folder else ""
        where = prefix + state
        saved[head] = [head + name for name in _listed(where, content["_data_files"])]
        for name in saved[head]:
            if name not in below or _leads_out(prefix + folder, prefix + name):
                raise DataError(
                    [
                        f"{where}: lists {_printable(name.removeprefix(head))}, which is no file "
                        "of this folder; save or download the data set again"
                    ]
                )
    return saved


def _listed(where: str, files: Any) -> list[str]:
    """The file names of a `state.json`, each of them without a folder."""
    entries = files if isinstance(files, list) else [files]
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
    for name, entry in zip(names, entries, strict=True):
        if not isinstance(name, str) or not name or set(name) & set("/\\:") or name in (".", ".."):
            shown = _printable(entry if name is None else name)
            raise DataError(
                [
                    f"{where}: lists {shown}, which is not the name of a file in this folder; "
                    "save or download the data set again"
                ]
            )
    return [str(name) for name in names]


def _leads_out(folder: str, path: str) -> bool:
    """Whether a local file is a link to outside its folder, other than to a hub cache's blobs."""
    if "://" in folder:
        return False
    real, target = os.path.realpath(folder), os.path.realpath(path)
    cache, snapshots, _ = real.partition("/snapshots/")
    allowed = [real, *([f"{cache}/blobs"] if snapshots else [])]
    return not any(target.startswith(f"{place}/") for place in allowed)


def _content(name: str, open_in: Callable[[str], Any]) -> dict[str, Any]:
    """The JSON object in a file; empty if it holds something else."""
    try:
        with open_in(name) as file:
            content = json.load(file)
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _printable(value: Any) -> str:
    text = str(value)
    return text[:200] if text.isprintable() else repr(text[:200])
