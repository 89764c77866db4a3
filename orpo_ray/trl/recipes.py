"""Recipes of axolotl, LLaMA-Factory and alignment-handbook as settings.

Their keys get TRL's names, or those of settings here, by the rows of `recipes.csv`, and go the way
of TRL's names. A row that becomes nothing is said by another key, or has a remark.
"""

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from orpo_ray.config.file import to_yaml
from orpo_ray.config.schema import SECTION_OF, ConfigError, ORPOConfig
from orpo_ray.storage.files import first_line
from orpo_ray.trl.names import names
from orpo_ray.trl.translations import translate

Settings = dict[str, Any]
Make = Callable[[Any, Settings, Path, list[str]], Settings]
# What each of them does where a recipe says nothing, and this project does not.
_DEFAULTS: Mapping[str, Settings] = {
    "axolotl": {
        **{"sequence_len": 512, "micro_batch_size": 1, "num_epochs": 1, "lr_scheduler": "cosine"}
    },
    "LLaMA-Factory": {"cutoff_len": 2048, "learning_rate": 5e-5, "nll_scope": "completion"},
    "alignment-handbook": {"learning_rate": 1e-6, "gradient_checkpointing": True},
}
_LATER = "num_workers: a recipe does not say on how many GPUs it ran; set it to their number"


@dataclass(frozen=True)
class Converted:
    """A recipe as a config, of which it decides `leaves`; `left` are lines about other keys."""

    config: ORPOConfig
    leaves: tuple[str, ...]
    left: tuple[str, ...]


def converted_text(path: Path) -> str:
    """The config of a recipe's file as YAML, below comments about what is not in it.

    Raises:
        ConfigError: for a file that is no recipe, or not of ORPO.
    """
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError([f"{path}: {first_line(error)}"]) from error
    if not isinstance(recipe, dict):
        raise ConfigError([f"{path}: no keys and values"])
    found = convert(recipe, path.parent)
    lines = [f"# - {first_line(line)}\n" for line in found.left]
    head = f"# From {path.name}. What became no setting, or another one:\n"
    return head + "".join(lines) + to_yaml(found.config, found.leaves)


def convert(recipe: Mapping[str, Any], folder: Path) -> Converted:
    """A recipe, of which paths are relative to `folder`, as a config of this project.

    Raises:
        ConfigError: for a recipe that trains something else than ORPO.
    """
    kind = "alignment-handbook"
    trained: Any = "orpo"
    if "base_model" in recipe:
        kind, trained = "axolotl", recipe.get("rl")
    elif "stage" in recipe:
        kind, trained = "LLaMA-Factory", recipe.get("pref_loss", recipe["stage"])
    if trained != "orpo":
        raise ConfigError(
            [f"a recipe of {kind} that trains {trained or 'without pairs'}, not orpo"]
        )
    with (Path(__file__).parent / "recipes.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["key"]: row for row in csv.DictReader(file)}
    given = {name: value for name, value in recipe.items() if value is not None}
    left: list[str] = []
    settings: Settings = {}
    for name, value in (_DEFAULTS[kind] | given).items():
        ours = rows[name]["becomes"] if name in rows else name
        if name in _MADE:
            settings |= _MADE[name](value, given, folder, left)
        elif ours in SECTION_OF or ours in names():
            settings[ours] = value
        elif value and (remark := rows.get(name, {"remark": "not known here"})["remark"]):
            left.append(f"{name}: {remark}")
    if given.get("use_peft") is False:
        settings = {name: v for name, v in settings.items() if not name.startswith("lora_")}
    found = translate(settings)
    left += [*found.findings, *found.warnings, *found.notes]
    config = _validated(found.settings, left)
    return Converted(config, tuple(found.settings), (*left, _LATER))


def _validated(settings: Settings, left: list[str]) -> ORPOConfig:
    """The config of settings, without those that it refuses: they are moved to `left`."""
    while True:
        try:
            return ORPOConfig(**settings)
        except ConfigError as error:
            refused = {part for place in error.places for part in place} & settings.keys()
            if not refused:
                raise
            left += error.lines
            for name in refused:
                del settings[str(name)]


def _datasets(value: Any, given: Settings, folder: Path, left: list[str]) -> Settings:
    """Axolotl's list of data sets: files, or one data set of the hub."""
    files = [str(e.get("data_files") or e["path"]) for e in value if _is_file(e, folder)]
    if files or len(value) > 1:
        if len(files) < len(value):
            left.append("datasets: several of the hub; download them, and add them to train_files")
        return {"train_files": files} if files else {}
    theirs = {"path": "dataset_name", "name": "dataset_config", "split": "dataset_train_split"}
    return {ours: value[0][name] for name, ours in theirs.items() if value[0].get(name)}


def _is_file(entry: Mapping[str, Any], folder: Path) -> bool:
    return bool(entry.get("data_files")) or (folder / entry["path"]).exists()


def _registered(value: str, given: Settings, folder: Path, left: list[str]) -> Settings:
    """LLaMA-Factory's names of data sets, which its `dataset_info.json` explains."""
    place = folder / given.get("dataset_dir", "data")
    info = place / "dataset_info.json"
    known = json.loads(info.read_text(encoding="utf-8")) if info.is_file() else {}
    entries = [known.get(name.strip(), {}) for name in value.split(",")]
    if len(entries) == 1 and "hf_hub_url" in entries[0]:
        return {"dataset_name": entries[0]["hf_hub_url"]}
    files = [str(place / entry["file_name"]) for entry in entries if "file_name" in entry]
    if len(files) < len(entries):
        left.append(f"dataset: {value}: not found in {info}; set train_files or dataset_name")
    return {"train_files": files} if files else {}


def _mixer(value: Mapping[str, float], given: Settings, folder: Path, left: list[str]) -> Settings:
    """Alignment-handbook's mixture, where it is of one whole data set."""
    if list(value.values()) == [1.0]:
        return {"dataset_name": next(iter(value))}
    left.append("dataset_mixer: several data sets, or a part; set train_files with weights")
    return {}


def _targets(value: Any, given: Settings, *_: Any) -> Settings:
    if given.get("lora_target_linear") or value in ("all", "all-linear"):
        return {}
    return {"lora_target_modules": value.split(",") if isinstance(value, str) else value}


def _template(value: str, given: Settings, folder: Path, left: list[str]) -> Settings:
    if "{" in value:
        return {"chat_template": value}
    left.append(f"chat_template: {value}: the tokenizer's is used; give the path or text of one")
    return {}


def _often(n: int, given: Settings) -> float | str:
    """So many times an epoch, as a share of all steps."""
    return "epoch" if n == 1 else 1 / (n * given.get("num_epochs", 1))


def _tuning(value: str, given: Settings, folder: Path, left: list[str]) -> Settings:
    """LLaMA-Factory's `finetuning_type`, with its own defaults of adapters."""
    if value == "lora":
        rank = given.get("lora_rank", 8)
        return {"lora_r": rank, "lora_alpha": given.get("lora_alpha", 2 * rank)}
    left += [] if value == "full" else [f"finetuning_type: {value}: all weights are trained"]
    return {}


_MADE: Mapping[str, Make] = {
    "attn_implementation": lambda value, *_: {"model_init_kwargs": {"attn_implementation": value}},
    "chat_template": _template,
    "bf16": lambda value, *_: {"bf16": None if value == "auto" else bool(value)},
    "dataset": _registered,
    "dataset_mixer": _mixer,
    "datasets": _datasets,
    "evals_per_epoch": lambda n, given, *_: {"eval_steps": _often(n, given)},
    "finetuning_type": _tuning,
    "lora_target": _targets,
    "lora_target_modules": _targets,
    "quantization_bit": lambda value, *_: {"load_in_4bit": value == 4},
    "saves_per_epoch": lambda n, given, *_: {"save_steps": _often(n, given)},
    "wandb_project": lambda value, *_: {"report_to": "wandb"} if value else {},
}
