"""Turning what a user names (files, a hub id, objects in memory) into files; on the driver."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo_ray.config import ORPOConfig
from orpo_ray.preference.demo_pairs import write_demo_pairs
from orpo_ray.preference.errors import DataError
from orpo_ray.preference.sources import find_files
from orpo_ray.training.model_source import ModelSource

DEMO_TRAIN_PAIRS, DEMO_EVAL_PAIRS = 4000, 400


@dataclass(frozen=True)
class RunInputs:
    """The files and the model of a run.

    Args:
        train_files: absolute paths.
        eval_files: absolute paths, by metric prefix.
        model: base model and tokenizer.
    """

    train_files: tuple[str, ...]
    eval_files: Mapping[str, tuple[str, ...]]
    model: ModelSource


def find_inputs(config: ORPOConfig, output_directory: Path) -> RunInputs:
    """Find every input that the config names; what it leaves out is the demo's.

    Raises:
        DataError: naming every path or pattern with no usable file, and a missing model folder.
    """
    data = config.data
    if data.dataset_name:
        return _from_hub(config, output_directory)
    problems: list[str] = []
    train_files = _found("train_files", data.train_files, problems)
    eval_files = _found("eval_files", data.eval_files, problems)
    model = _base_model(config, problems)
    if problems:
        raise DataError(problems)
    if model is None or data.train_files is None:
        demo = _make_demo(output_directory, config.train.seed)
        model = model or demo.model
        if data.train_files is None:
            train_files = demo.train_files
            eval_files = eval_files or demo.eval_files["eval_"]
    return RunInputs(train_files, {"eval_": eval_files} if eval_files else {}, model)


def _found(setting: str, patterns: tuple[str, ...] | None, problems: list[str]) -> tuple[str, ...]:
    """The files of a setting; what is wrong with them is added to `problems`."""
    try:
        return tuple(find_files(patterns or ()))
    except DataError as error:
        problems += [f"{setting}: {line}" for line in error.lines]
        return ()


def _base_model(config: ORPOConfig, problems: list[str]) -> ModelSource | None:
    """The base model that the config names, if it does; a folder that is none is a problem."""
    name = config.model.model_name_or_path
    if name is None:
        return None
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            problems.append(f"model_name_or_path: {name} holds no config.json")
        return ModelSource(str(path.resolve()), str(path.resolve()))
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        problems.append(f"model_name_or_path: {name}: no such folder")
    return ModelSource(name, name, config.model.model_revision)


def _make_demo(output_directory: Path, seed: int) -> RunInputs:
    """The demo's pairs, tokenizer and random base model, made once below the output directory."""
    home = output_directory / f"demo-{seed}"
    model = home / "base-model"
    train, evals = home / "train.jsonl", home / "eval.jsonl"
    if not (model / "config.json").exists():
        from transformers.utils.logging import disable_progress_bar

        from orpo_ray.training.demo_model import make_demo_model

        disable_progress_bar()
        home.mkdir(parents=True, exist_ok=True)
        write_demo_pairs(str(home), DEMO_TRAIN_PAIRS, DEMO_EVAL_PAIRS, seed)
        texts = []
        for line in train.read_text().splitlines():
            pair = json.loads(line)
            texts += [pair["prompt"] + pair["chosen"], pair["prompt"] + pair["rejected"]]
        make_demo_model(str(model), texts, seed)
    source = ModelSource(str(model), str(model))
    return RunInputs((str(train),), {"eval_": (str(evals),)}, source)


def _from_hub(config: ORPOConfig, output_directory: Path) -> RunInputs:
    """The splits of a hub data set, kept as Parquet below the output directory."""
    from datasets import load_dataset

    data = config.data
    files: dict[str, tuple[str, ...]] = {}
    for prefix, split in (("", data.dataset_train_split), ("eval_", data.dataset_test_split)):
        if split:
            dataset = load_dataset(data.dataset_name, split=split)
            files[prefix] = (keep_dataset(dataset, output_directory / "inputs"),)
    local = config.replace(dataset_name=None, train_files=files[""], eval_files=files.get("eval_"))
    return find_inputs(local, output_directory)


def keep_dataset(dataset: Any, directory: Path) -> str:
    """Write a data set held in memory as one Parquet file, named by its content.

    Args:
        dataset: a `datasets.Dataset`, a Ray Dataset, or a dict of lists.
        directory: where; made if missing.

    Returns:
        The file's path.

    Raises:
        DataError: for any other type.
    """
    import datasets
    import ray.data

    if isinstance(dataset, Mapping):
        dataset = datasets.Dataset.from_dict(dict(dataset))
    if isinstance(dataset, ray.data.Dataset):
        dataset = datasets.Dataset.from_list(dataset.take_all())
    if not isinstance(dataset, datasets.Dataset):
        raise DataError(
            [
                f"train_dataset: a {type(dataset).__name__} cannot be read; give a path, a hub id, "
                "a datasets.Dataset, a Ray Dataset or a dict of lists"
            ]
        )
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{dataset._fingerprint}.parquet"
    if not path.exists():
        dataset.to_parquet(str(path))
    return str(path)
