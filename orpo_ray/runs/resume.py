"""Whether a run may resume from a checkpoint: the settings and data that decide its weights.

Runs in training workers and on the driver; needs no torch.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from orpo_ray.config.model import ModelSection
from orpo_ray.config.schema import SECTION_OF, ORPOConfig, settings_that_decide
from orpo_ray.runs.manifest import checkpoint_directories, read_manifest


class ResumeError(ValueError):
    """The checkpoint was made with other settings or data than those of the config."""


# Tokens are compared by their digest; the base model's settings decide its weights as well.
_DECISIVE = settings_that_decide("weights") | (
    settings_that_decide("tokens") & ModelSection.model_fields.keys()
)


def decisive_settings(config: ORPOConfig, data_digest: str) -> dict[str, Any]:
    """The settings that a manifest records: with another value of one it is another run.

    Args:
        config: the run's config.
        data_digest: digest of the token set that it trains on.
    """
    values = config.model_dump(mode="json")
    settings = {name: values[SECTION_OF[name]][name] for name in sorted(_DECISIVE)}
    return settings | {"train_data": data_digest}


def settings_hash(settings: Mapping[str, Any]) -> str:
    """A short name for all decisive settings."""
    return xxhash.xxh3_64_hexdigest(json.dumps(settings, sort_keys=True).encode())


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each decisive setting that differs from a checkpoint's.

    A setting that only one of them has came or went with a version of this project.
    """
    lines = []
    for name in sorted(before.keys() & now.keys()):
        old, new = before[name], now[name]
        if old == new:
            continue
        if name == "train_data":
            lines.append("train_data: the training pairs are not those of the checkpoint")
        else:
            lines.append(f"{name}: {json.dumps(old)} in the checkpoint, {json.dumps(new)} now")
    return lines


def refuse_changes(manifest: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse to resume with other settings or data.

    Raises:
        ResumeError: with every difference.
    """
    lines = changed_settings(manifest["settings"], settings)
    if lines:
        raise ResumeError(
            "\n".join(
                [
                    *lines,
                    f"step {manifest['step']} of this run directory was made with the old values: "
                    "restore them, choose another run_name, or set resume_changed=true",
                ]
            )
        )


def newest_manifest(run_directory: Path) -> dict[str, Any] | None:
    """The newest manifest that can be read; its files are not verified."""
    for directory in checkpoint_directories(run_directory):
        try:
            return read_manifest(directory)
        except ValueError:
            continue
    return None
