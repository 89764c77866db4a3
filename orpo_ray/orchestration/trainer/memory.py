"""Models, tokenizers and data sets held in memory become files of a run; on the driver."""

import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet as pq
import xxhash
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orpo_ray.config.data import DataSource
from orpo_ray.config.schema import ConfigError
from orpo_ray.orchestration.inputs import as_sources, keep_dataset, no_progress_bars
from orpo_ray.orchestration.trainer.adapters import base_weights
from orpo_ray.preference.errors import DataError
from orpo_ray.preference.reading.finding import passed_over_text, search_files
from orpo_ray.preference.special_tokens import special_tokens
from orpo_ray.pretrained import ModelSource, load_tokenizer
from orpo_ray.runs.manifest import fingerprint
from orpo_ray.storage.files import first_line
from orpo_ray.storage.folder import Folder

_ANSWERS = ("chosen", "rejected")
_TURN = "\n\nAssistant:"
_LOOKED_AT, _FEW_ROWS = 100, 100_000
_log = logging.getLogger(__name__)


def tokenizer_of(model: Any) -> Any:
    """The tokenizer of the folder or hub id that a model in memory was loaded from.

    Raises:
        ConfigError: when there is none.
    """
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    try:
        if name:
            return load_tokenizer(ModelSource(name, name))
    except (OSError, ValueError) as error:
        reason = f" ({first_line(error)})"
    else:
        reason = ""
    text = "processing_class: a model in memory comes without its tokenizer; give it"
    raise ConfigError([text + reason])


def _each(rows: Iterable[Any]) -> Iterator[Any]:
    """A generator as `datasets` takes it, that is a function of its own."""
    yield from rows


def _with_prompts(dataset: Any) -> Any:
    """Texts without a prompt, split where the answers begin to differ, as TRL does.

    Dialogues in one text are left as they are: they are split at their last turn.
    """
    import datasets

    if isinstance(dataset, Mapping):
        if set(dataset) != set(_ANSWERS):
            return dataset
        dataset = datasets.Dataset.from_dict(dict(dataset))
    if not isinstance(dataset, datasets.Dataset) or not len(dataset):
        return dataset
    texts = {name for name, feature in dataset.features.items() if _holds_text(feature)}
    if texts != set(_ANSWERS) or not isinstance(first := dataset[0]["chosen"], str):
        return dataset
    if _TURN in first:
        return dataset

    def split(row: dict[str, str]) -> dict[str, str]:
        letters = zip(row["chosen"], row["rejected"], strict=False)
        n_same = sum(1 for _ in itertools.takewhile(lambda two: two[0] == two[1], letters))
        prompt = row["chosen"][:n_same].removesuffix(" ")
        return {"prompt": prompt} | {name: row[name].removeprefix(prompt) for name in _ANSWERS}

    _log.info("the data set has no prompts: they are what both answers of a pair begin with")
    with no_progress_bars():
        return dataset.map(split, keep_in_memory=len(dataset) < _FEW_ROWS)


def _holds_text(feature: Any) -> bool:
    return getattr(feature, "dtype", "list") in ("string", "large_string", "list")


class KeptInputs:
    """The folder of a run in which its inputs are kept.

    Args:
        folder: made when something is kept.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def files(self, dataset: Any) -> tuple[str, ...]:
        """The files of one data set, written if it is in memory."""
        import datasets

        if isinstance(dataset, str | Path):
            return self._named(str(dataset))
        if isinstance(dataset, datasets.DatasetDict | datasets.IterableDatasetDict):
            name = next(iter(dataset))
            raise DataError([f"a data set of several splits: give one, such as {name!r}"])
        if isinstance(dataset, datasets.IterableDataset):
            return (self._streamed(dataset, dataset.features),)
        if isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom":
            return (self._streamed(dataset, None),)  # with_transform: files hold what it makes
        if isinstance(dataset, datasets.Dataset) and not dataset.format["output_all_columns"]:
            dataset = dataset.select_columns(dataset.format["columns"])  # of set_format
        return (keep_dataset(_with_prompts(dataset), self._folder),)

    def are_templated(self, files: Iterable[str], tokenizer: Any) -> bool:
        """Whether the first pairs of kept files are texts with special tokens, every one.

        A chat template has written them: the text of a user has none but by chance.
        """
        pattern = special_tokens(tokenizer)
        bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
        texts: list[Any] = []
        for file in files:
            path = self._folder.path / Path(file).name
            if not path.is_file():
                continue
            whole = pq.ParquetFile(path)
            named = [name for name in ("prompt", "chosen") if name in whole.schema_arrow.names]
            for row in next(whole.iter_batches(_LOOKED_AT, columns=named)).to_pylist():
                prompt, chosen = row.get("prompt", ""), row.get("chosen")
                if not isinstance(prompt, str) or not isinstance(chosen, str):
                    return False
                texts.append(prompt.removeprefix(bos) + "\n" + chosen.removesuffix(eos))
        return bool(texts) and all(map(pattern.search, texts))

    def eval_files(self, dataset: Any) -> dict[str, tuple[DataSource, ...]]:
        """The files of every evaluation set, by metric prefix."""
        named = isinstance(dataset, Mapping) and not any(
            isinstance(value, list | tuple) for value in dataset.values()
        )
        if not named:
            return {"eval_": as_sources(self.files(dataset))}
        parts = {name: self.files(part) for name, part in dataset.items()}
        return {
            f"eval_{name}_": as_sources(files, DataSource(path="-", name=name))
            for name, files in parts.items()
        }

    def model(self, model: PreTrainedModel) -> Folder:
        """The base model's folder; of a model with adapters, without them."""

        def save(folder: Path) -> None:
            base, weights = base_weights(model)
            base.save_pretrained(folder, state_dict=weights)

        return self._keep("model", save, "*.safetensors")

    def tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> Folder:
        """The tokenizer's folder.

        Raises:
            ConfigError: for one without an end token.
        """
        if tokenizer.eos_token is None:
            raise ConfigError(
                ["processing_class: it has no eos_token, which answers end with; set one"]
            )
        return self._keep("tokenizer", tokenizer.save_pretrained, "*")

    def _streamed(self, rows: Iterable[Any], features: Any) -> str:
        """A file of rows that are read through once, a few of them in memory; named by content."""
        import datasets

        folder = self._folder.make()
        with TemporaryDirectory(dir=folder.path) as cache, no_progress_bars():
            whole = datasets.Dataset.from_generator(
                _each, features=features, cache_dir=cache, gen_kwargs={"rows": rows}
            )
            temporary = Path(cache) / "rows.parquet"
            whole.to_parquet(str(temporary))
            name = f"{fingerprint(temporary)['xxh3_128']}.parquet"
            temporary.replace(folder.path / name)
        folder.publish(name)
        return f"{folder}/{name}"

    def _named(self, name: str) -> tuple[str, ...]:
        """A path, a glob, or a hub id as `owner/name` that is no path here."""
        on_hub = name.count("/") == 1 and not Path(name).suffix and not Path(name).parent.exists()
        if on_hub:
            from datasets import load_dataset

            return (keep_dataset(load_dataset(name, split="train"), self._folder),)
        found = search_files([name])
        if found.passed_over:
            _log.info("%s: passed over: %s", name, passed_over_text(found.passed_over))
        return found.files

    def _keep(self, name: str, save: Callable[[Path], object], compared: str) -> Folder:
        """Write what is held in memory into a folder, unless an earlier attempt has done so.

        That of an earlier attempt stays as it is; where it holds something else, there are two.

        Args:
            name: of the folder.
            save: writes into a folder.
            compared: pattern of the files by which two of them are the same.
        """
        new = self._folder / f"{name}-{os.getpid()}.tmp"
        new.remove()
        save(new.path)
        files = [fingerprint(path) for path in sorted(new.path.glob(compared))]
        for kept in (name, f"{name}-{xxhash.xxh3_64_hexdigest(json.dumps(files).encode())}"):
            folder = (self._folder / kept).fetch()
            if not folder.path.exists():
                new.path.rename(folder.path)
                folder.publish_all()
                break
            if files == [fingerprint(path) for path in sorted(folder.path.glob(compared))]:
                break
        new.remove()
        return folder
