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
from orpo_ray.runs.manifest import checkpoint, checkpoint_directories, read_manifest
from orpo_ray.storage.folder import Folder


class ResumeError(ValueError):
    """The checkpoint in the run directory was made with another config or other data."""


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
    return settings | {"nll_scope": config.orpo.in_nll, "train_data": data_digest}


def settings_hash(settings: Mapping[str, Any]) -> str:
    """A short name for all decisive settings."""
    return xxhash.xxh3_64_hexdigest(json.dumps(settings, sort_keys=True).encode())


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each setting that differs from a checkpoint's.

    A setting that only one of them has was added or removed by another version of this project.
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


def refuse_changes(
    run: Folder, manifest: Mapping[str, Any], config: ORPOConfig, data_digest: str | None = None
) -> None:
    """Refuse to resume with other settings or data; with `resume_changed`, another batch or optim.

    Args:
        run: the run directory.
        manifest: of the checkpoint that the run would resume from.
        config: of this attempt, with its pairs per step.
        data_digest: see `decisive_settings`; None: the data is not known yet.

    Raises:
        ResumeError: with every difference.
    """
    made = checkpoint(run, manifest["step"])
    lines = []
    before, now = manifest["global_batch_pairs"], config.pairs_per_step
    if before != now:
        lines.append(
            f"{made} counts {before} pairs a step, this config {now}; set "
            f"global_batch_size={before}, or another run_name"
        )
    optim = manifest["settings"].get("optim", "adamw")  # an earlier version had no other
    if optim != config.train.optim:
        lines.append(
            f"{made} has the state of optim={optim}, not of {config.train.optim}: set "
            f"optim={optim}, or another run_name"
        )
    settings = decisive_settings(config, data_digest or "")
    del settings["optim"]
    if data_digest is None:
        del settings["train_data"]
    changed = changed_settings(manifest["settings"], settings)
    if changed and not config.train.resume_changed:
        lines += [
            *changed,
            f"{made} was made with other settings or pairs: set them back, choose another "
            "run_name, or set resume_changed=true",
        ]
    if lines:
        raise ResumeError("\n".join(lines))


def with_batch_size(config: ORPOConfig, manifest: Mapping[str, Any] | None) -> ORPOConfig:
    """Set the pairs per step; a run that resumes with other workers keeps those of its checkpoint.

    Args:
        config: of this attempt.
        manifest: of the checkpoint that it resumes from, if there is one.
    """
    pairs = config.pairs_per_step
    if manifest is not None and config.train.global_batch_size is None:
        mine = config.pairs_per_worker
        # An earlier version did not record them.
        if manifest.get("pairs_per_worker", mine) == mine:
            pairs = manifest["global_batch_pairs"]
    return config.replace(global_batch_size=pairs)


def newest_manifest(run_directory: Path) -> dict[str, Any] | None:
    """The newest manifest that can be read; its files are not looked at."""
    for directory in checkpoint_directories(run_directory):
        try:
            return read_manifest(directory)
        except ValueError:
            continue
    return None
