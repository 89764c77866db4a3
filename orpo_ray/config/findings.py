"""What is wrong with a config, a line each: the same in YAML and in Python."""

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

# Names in other trainers for settings whose names here are spelled too differently to be suggested.
_OTHER_NAMES = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "base_model": "model_name_or_path",
    "model_name": "model_name_or_path",
    "lambda": "beta",
    "alpha": "beta",
    "orpo_alpha": "beta",
    "sequence_len": "max_length",
    "max_seq_length": "max_length",
    "datasets": "train_files",
    "data_files": "train_files",
    "train_file": "train_files",
    "dataset": "dataset_name",
    "scheduler": "lr_scheduler_type",
    "lr_scheduler": "lr_scheduler_type",
    "gpus": "use_gpu",
    "workers": "num_workers",
    "keep_checkpoints": "save_total_limit",
}


def finding(details: Any, section_of: Mapping[str, str]) -> str:
    """One pydantic error as `field: what is wrong (got value)`, or with the nearest valid name.

    Args:
        details: an entry of `ValidationError.errors()`.
        section_of: the section of every setting.
    """
    where = ".".join(str(part) for part in details["loc"])
    if details["type"] == "extra_forbidden":
        return f"{where}: no such setting{nearest(str(details['loc'][-1]), section_of)}"
    message = details["msg"].removeprefix("Value error, ")
    value = details.get("input")
    shown = "" if isinstance(value, Mapping | BaseModel) else f" (got {value!r})"
    return f"{where or 'config'}: {message[:1].lower()}{message[1:]}{shown}"


def nearest(name: str, section_of: Mapping[str, str]) -> str:
    """Suggest the valid name that is closest to `name`."""
    near = [_OTHER_NAMES[name]] if name in _OTHER_NAMES else []
    known = [*section_of, *dict.fromkeys(section_of.values())]
    near += difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not near:
        return "; --help lists all of them"
    section = section_of.get(near[0])
    return f"; did you mean {section}.{near[0]}?" if section else f"; did you mean {near[0]}?"
