"""ORPOTrainer: what a TRL user writes, with the import changed; on the driver."""

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import xxhash
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orpo_ray.config.data import DataSource
from orpo_ray.config.schema import ORPOConfig
from orpo_ray.orchestration.evaluate import evaluate
from orpo_ray.orchestration.inputs import RunInputs, as_sources, find_inputs, keep_dataset
from orpo_ray.orchestration.start import run_directory_of, with_run_name
from orpo_ray.orchestration.train import TrainResult, train
from orpo_ray.preference.reading.finding import passed_over_text, search_files
from orpo_ray.pretrained import ModelSource
from orpo_ray.runs.files import FINAL
from orpo_ray.runs.lock import claimed
from orpo_ray.runs.manifest import fingerprint
from orpo_ray.storage.folder import Folder

_log = logging.getLogger(__name__)


class ORPOTrainer:
    """Train a model on preference pairs with ORPO, on the Ray cluster at hand or this machine.

    Args:
        model: folder, hub id, or a model in memory; unset: the one that `args` names.
        args: the run.
        train_dataset: a path or glob, a hub id, a `datasets.Dataset`, a Ray Dataset, a pandas
            frame, or a dict of lists with `prompt`, `chosen` and `rejected`; unset: the files that
            `args` names.
        eval_dataset: the same, or a dict of such data sets by name, whose metrics are then
            `eval_<name>_...`.
        processing_class: the tokenizer; unset: the model's own.

    Raises:
        ConfigError: while another driver has the run directory.
        DataError: for missing files and data that cannot be read.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | None = None,
        args: ORPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
    ) -> None:
        config = with_run_name(args or ORPOConfig())
        self._run_directory = run_directory_of(config)
        self._kept = self._run_directory / "inputs"
        with claimed(self._run_directory):
            if model is not None:
                name = model if isinstance(model, str) else self._keep_model(model)
                config = config.replace(model_name_or_path=name)
            if train_dataset is not None:
                config = config.replace(train_files=self._files(train_dataset), dataset_name=None)
            inputs = find_inputs(config, self._run_directory.parent)
            if eval_dataset is not None:
                inputs = dataclasses.replace(inputs, eval_files=self._eval_files(eval_dataset))
            if processing_class is not None:
                source = self._keep_tokenizer(processing_class, inputs)
                inputs = dataclasses.replace(inputs, model=source)
        self.args = config
        self.result: TrainResult | None = None
        self._inputs = inputs

    def train(self) -> TrainResult:
        """Train; with the `run_name` of an earlier run, go on from its newest checkpoint."""
        self.result = train(self.args, self._inputs)
        return self.result

    def evaluate(self) -> dict[str, float]:
        """Metrics on the evaluation data: of the trained model, before `train()` of the base.

        The run directory then has what `orpo_ray.evaluate` writes.

        Raises:
            DataError: without evaluation data.
        """
        inputs = self._inputs
        if self.result is not None:
            model = Folder.at(self.result.model_directory)
            trained = dataclasses.replace(inputs.model, model=model)
            inputs = dataclasses.replace(inputs, model=trained)
        return evaluate(self.args, inputs).metrics

    def save_model(self, output_dir: str | None = None) -> str:
        """Copy the trained model, ready for `from_pretrained`; returns where it lies.

        Args:
            output_dir: made if missing; unset: it stays where it is, in the run directory.

        Raises:
            FileNotFoundError: before `train()` has ended.
        """
        final = self._run_directory / FINAL
        if not final.path.is_dir():
            raise FileNotFoundError(f"{final}: no trained model yet; call train() first")
        if output_dir is None:
            return final.address
        shutil.copytree(final.fetch(), output_dir, dirs_exist_ok=True)
        return output_dir

    def _files(self, dataset: Any) -> tuple[str, ...]:
        """The files of one data set, written if it is in memory."""
        if isinstance(dataset, str | Path):
            return _named_dataset(str(dataset), self._kept)
        return (keep_dataset(dataset, self._kept),)

    def _eval_files(self, dataset: Any) -> dict[str, tuple[DataSource, ...]]:
        """The files of every evaluation set, by metric prefix."""
        named = isinstance(dataset, Mapping) and not any(
            isinstance(value, list | tuple) for value in dataset.values()
        )
        if not named:
            return {"eval_": as_sources(self._files(dataset))}
        parts = {name: self._files(part) for name, part in dataset.items()}
        return {
            f"eval_{name}_": as_sources(files, DataSource(path="-", name=name))
            for name, files in parts.items()
        }

    def _keep_model(self, model: PreTrainedModel) -> str:
        """Write a model held in memory into the run directory."""
        return self._keep("model", model.save_pretrained, "*.safetensors").address

    def _keep_tokenizer(self, tokenizer: PreTrainedTokenizerBase, inputs: RunInputs) -> ModelSource:
        """Write a tokenizer held in memory into the run directory."""
        folder = self._keep("tokenizer", tokenizer.save_pretrained, "*")
        return dataclasses.replace(inputs.model, tokenizer=folder)

    def _keep(self, name: str, save: Callable[[Path], object], compared: str) -> Folder:
        """Write what is held in memory into a folder, unless an earlier attempt has done so.

        That of an earlier attempt stays as it is; where it holds something else, there are two.

        Args:
            name: of the folder.
            save: writes into a folder.
            compared: pattern of the files by which two of them are the same.
        """
        new = self._kept / f"{name}-{os.getpid()}.tmp"
        new.remove()
        save(new.path)
        files = [fingerprint(path) for path in sorted(new.path.glob(compared))]
        for kept in (name, f"{name}-{xxhash.xxh3_64_hexdigest(json.dumps(files).encode())}"):
            folder = (self._kept / kept).fetch()
            if not folder.path.exists():
                new.path.rename(folder.path)
                folder.publish_all()
                break
            if files == [fingerprint(path) for path in sorted(folder.path.glob(compared))]:
                break
        new.remove()
        return folder


def _named_dataset(name: str, directory: Folder) -> tuple[str, ...]:
    """A path, a glob, or a hub id as `owner/name` that is no path here."""
    on_hub = name.count("/") == 1 and not Path(name).suffix and not Path(name).parent.exists()
    if on_hub:
        from datasets import load_dataset

        return (keep_dataset(load_dataset(name, split="train"), directory),)
    found = search_files([name])
    if found.passed_over:
        _log.info("%s: passed over: %s", name, passed_over_text(found.passed_over))
    return found.files
