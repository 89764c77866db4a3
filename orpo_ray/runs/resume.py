"""Whether a run may go on from a checkpoint: the settings and data that decide its weights.

Runs in training workers and on the driver; needs no torch.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.runs.manifest import checkpoint_directories, read_manifest


class ResumeError(ValueError):
    """The run directory's checkpoint does not fit the config it is to go on with."""


# What may differ from the checkpoint without a word: how long and how often, how the work is cut,
# and which of the models is exported. The schedule of a longer run is the longer run's.
_FREE = {
    "attention",
    "attention_kernel",
    "baseline",
    "cpu_offload",
    "early_stopping_patience",
    "eval_steps",
    "global_batch_size",  # the loop compares the pairs of a step by themselves
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "gradient_checkpointing_every",
    "greater_is_better",
    "head_chunk_tokens",
    "load_best_model_at_end",
    "logging_steps",
    "max_new_tokens",
    "max_skipped_rows",
    "max_steps",
    "max_tokens_per_microbatch",
    "merge_adapter",
    "metric_for_best_model",
    "num_train_epochs",
    "on_nonfinite",
    "per_device_eval_batch_size",
    "per_device_train_batch_size",
    "resume_changed",
    "sample_prompts",
    "save_steps",
    "save_total_limit",
    "torch_compile",
    "use_liger_kernel",
}
_DATA = ("shuffle", "shuffle_window_shards")


def decisive_settings(config: ORPOConfig, data_digest: str) -> dict[str, Any]:
    """What a manifest keeps of a run: with another value of one of these it is another run.

    Args:
        config: of the run.
        data_digest: of the token set that it trains on.
    """
    values = config.model_dump(mode="json")
    kept = values["model"] | values["orpo"] | values["train"]
    kept |= {name: values["data"][name] for name in _DATA}
    settings = {name: value for name, value in sorted(kept.items()) if name not in _FREE}
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
    """Stop before a run goes on as another one.

    Raises:
        ResumeError: with every difference.
    """
    lines = changed_settings(manifest["settings"], settings)
    if lines:
        raise ResumeError(
            "\n".join(
                [
                    *lines,
                    f"step {manifest['step']} of this run directory was made otherwise: set it "
                    "back, choose another run_name, or go on with resume_changed=true",
                ]
            )
        )


def newest_manifest(run_directory: Path) -> dict[str, Any] | None:
    """The newest manifest that can be read; its files are not looked at."""
    for directory in checkpoint_directories(run_directory):
        try:
            return read_manifest(directory)
        except ValueError:
            continue
    return None
