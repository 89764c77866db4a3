"""Where the base model of LoRA adapters is, also when both folders were moved together."""

import os
from pathlib import Path

from orpo_ray.storage.files import read_json

EXPORT_RECORD = "orpo_ray.json"
"""In an exported folder: its step and, of adapters, the path to their base model's folder."""
_BASE, _MODEL = "base", "config.json"


def base_record(base: str, folder: Path) -> dict[str, str]:
    """What the record of exported adapters says of their base model; nothing of a hub id.

    Args:
        base: folder or hub id.
        folder: that the adapters are exported to.
    """
    if not Path(base).is_dir():
        return {}
    return {_BASE: os.path.relpath(Path(base).resolve(), folder.resolve())}


def find_base(named: str, folder: Path) -> str | None:
    """The base model of adapters, as a hub id or a folder; None for a folder that is not found.

    A folder is looked for as it is named, then where it was relative to the adapters when they were
    exported, then beside them by its name.

    Args:
        named: `base_model_name_or_path` of the adapters.
        folder: of the adapters.
    """
    if not Path(named).is_absolute() or Path(named).is_dir():
        return named
    recorded = read_json(folder / EXPORT_RECORD).get(_BASE)
    places = [folder / recorded] if isinstance(recorded, str) else []
    for place in (*places, folder.parent / Path(named).name):
        if (place / _MODEL).is_file():
            return str(place.resolve())
    return None
