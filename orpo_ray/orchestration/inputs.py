"""Turning what a user names (files, a hub id, objects in memory) into files; on the driver."""

import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from orpo_ray.config.data import DataSource
from orpo_ray.config.schema import ORPOConfig
from orpo_ray.dataset.request import TRAIN
from orpo_ray.demo.pairs import write_demo_pairs
from orpo_ray.preference.errors import DataError
from orpo_ray.preference.reading.finding import PassedOver, merge_passed_over, search_files
from orpo_ray.preference.reading.splits import TRAIN_SPLIT
from orpo_ray.preference.templates import template_text
from orpo_ray.pretrained import ModelSource, UnsupportedModelError, refuse_unsafe
from orpo_ray.storage.bucket import URLS
from orpo_ray.storage.files import first_line, locked, one_line, read_json, read_lines, some_of
from orpo_ray.storage.folder import Folder, FolderLike, light
from orpo_ray.storage.names import is_gguf

DEMO_TRAIN_PAIRS, DEMO_EVAL_PAIRS = 4000, 400
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunInputs:
    """The files and the model of a run.

    Args:
        train_files: one source a file, with its absolute path or URL.
        eval_files: the same, by metric prefix.
        model: base model and tokenizer.
        passed_over: what is not read of the folders and globs of a data set, by its name in the
            feed.
    """

    train_files: tuple[DataSource, ...]
    eval_files: Mapping[str, tuple[DataSource, ...]]
    model: ModelSource
    passed_over: Mapping[str, PassedOver] = field(default_factory=dict)


def find_inputs(
    config: ORPOConfig, output_directory: FolderLike, only_evals: bool = False
) -> RunInputs:
    """Find every input that the config names; what it leaves out is the demo's.

    Args:
        config: the run.
        output_directory: where the demo's inputs are made.
        only_evals: nothing is trained, so that no training data is needed.

    Raises:
        DataError: naming every path or pattern with no usable file, and a model whose folder is
            missing or which would run code.
    """
    data = config.data
    if data.dataset_name:
        return _from_hub(config, output_directory)
    problems: list[str] = []
    template = _chat_template(data.chat_template, problems)
    passed_over: dict[str, PassedOver] = {}
    train_files = _found("train_files", data.train_files, problems, passed_over)
    eval_files = eval_sets(_found("eval_files", data.eval_files, problems, passed_over))
    model = _base_model(config, problems, trains=not only_evals)
    if problems:
        raise DataError(problems)
    needs_demo_data = data.train_files is None and not (only_evals and model is not None)
    if model is None or needs_demo_data:
        demo = _make_demo(output_directory, config.train.seed)
        model = model or demo.model
        if needs_demo_data:
            train_files = demo.train_files
            eval_files = eval_files or dict(demo.eval_files)
    if template is not None:
        model = dataclasses.replace(model, chat_template=template)
    return RunInputs(train_files, eval_files, model, passed_over)


def _chat_template(setting: str | None, problems: list[str]) -> str | None:
    try:
        return None if setting is None else template_text(setting)
    except DataError as error:
        problems += error.lines
        return None


def as_sources(files: Sequence[str], like: DataSource | None = None) -> tuple[DataSource, ...]:
    """One source a file, with the weight and name of another.

    The paths were found, or made here: to validate each as what a user wrote takes milliseconds.
    """
    like = like or DataSource(path="/")
    return tuple(like.model_copy(update={"path": path}) for path in files)


def eval_sets(sources: Sequence[DataSource]) -> dict[str, tuple[DataSource, ...]]:
    """Sources by metric prefix: `eval_<name>_`, and `eval_` where they have no name."""
    sets: dict[str, list[DataSource]] = {}
    for source in sources:
        sets.setdefault(_prefix(source), []).append(source)
    return {prefix: tuple(found) for prefix, found in sets.items()}


def _prefix(source: DataSource) -> str:
    return f"eval_{source.name}_" if source.name else "eval_"


def _found(
    setting: str,
    named: Sequence[str | DataSource] | None,
    problems: list[str],
    passed_over: dict[str, PassedOver],
) -> tuple[DataSource, ...]:
    """The files of a setting; what is wrong with them is added to `problems`.

    A file that several entries find is read once; under two weights or names that is a problem,
    other than in two evaluation sets.
    What is not read is added to `passed_over`, and files of another split than expected are logged.
    """
    found: dict[tuple[str, str], DataSource] = {}
    for entry in named or ():
        like = entry if isinstance(entry, DataSource) else DataSource(path=entry)
        try:
            files = search_files([like.path])
        except DataError as error:
            problems += [f"{setting}: {line}" for line in error.lines]
            continue
        name = TRAIN if setting == "train_files" else _prefix(like)
        if files.passed_over:
            passed_over[name] = merge_passed_over([passed_over.get(name, {}), files.passed_over])
        for split in files.splits - {""}:
            if (split == TRAIN_SPLIT) != (name == TRAIN):
                _log.warning("%s: all files of %s are of the split %s", setting, like.path, split)
        for source in as_sources(files.files, like):
            if found.setdefault((name, source.path), source) != source:
                problems.append(
                    f"{setting}: {source.path}: named twice, with another weight or name"
                )
    return tuple(found.values())


def _base_model(config: ORPOConfig, problems: list[str], trains: bool) -> ModelSource | None:
    """The base model that the config names, if it does; adapters are one for evaluation only."""
    name = config.model.model_name_or_path
    if name is None:
        return None
    n_problems = len(problems)
    source = named_model("model_name_or_path", name, config, problems)
    if not trains or len(problems) > n_problems:
        return source
    if Path(source.model, "adapter_config.json").is_file():
        adapters = read_json(Path(source.model, "adapter_config.json"))
        base = adapters.get("base_model_name_or_path")
        problems.append(
            f"model_name_or_path: {name} holds LoRA adapters (adapter_config.json), which are not "
            f"trained further: name their base model ({base}), or one with the adapters merged "
            "into it (merge_adapter=true)"
        )
        return source
    from orpo_ray.models.quantized import refuse_stored_quantized

    try:
        refuse_stored_quantized(source)
    except (OSError, ValueError) as error:
        problems.append(f"model_name_or_path: {first_line(error)}")
    return source


def named_model(setting: str, name: str, config: ORPOConfig, problems: list[str]) -> ModelSource:
    """A model by its folder or hub id.

    A folder is given by its absolute path, as actors have working folders of their own; one that
    holds no model, or a model that would run code, is added to `problems`.
    """
    if is_gguf(name):
        return _from_gguf(setting, name, config, problems)
    is_url = "://" in name
    folder = None
    if is_url:
        try:
            folder = _fetched(name)
        except (OSError, ValueError) as error:
            problems.append(f"{setting}: {name}: {one_line(error)}")
            return ModelSource.from_config(config.model, name)
    path = folder.path if folder else Path(name).expanduser()
    found = str(path.resolve()) if path.is_dir() else name
    source = ModelSource.from_config(config.model, folder or found)
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if files and not any(path.glob("*.safetensors")):
            names = some_of([str(file) for file in files])
            problems.append(f"{setting}: {name} holds GGUF files only; name one of them: {names}")
            return source
        if not any((path / kind).is_file() for kind in ("config.json", "adapter_config.json")):
            problems.append(f"{setting}: {name} holds no config.json")
            return source
    elif is_url or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        problems.append(f"{setting}: {name}: no such folder")
        return source
    try:
        refuse_unsafe(source)
    except (OSError, ValueError) as error:  # also what transformers says of ids that are none
        problems.append(f"{setting}: {first_line(error)}")
    return source


def _from_gguf(setting: str, name: str, config: ORPOConfig, problems: list[str]) -> ModelSource:
    """A model in a GGUF file, as the folder that it is converted to below the output directory."""
    from orpo_ray.models.gguf import convert_gguf

    try:
        folder, said = convert_gguf(name, Folder.at(config.output.output_dir) / "gguf")
    except (OSError, UnsupportedModelError) as error:
        problems.append(f"{setting}: {first_line(error)}")
        return ModelSource.from_config(config.model, name)
    _log.info("%s: %s", setting, said)
    return ModelSource.from_config(config.model, folder)


def _fetched(url: str) -> Folder:
    """A model in a bucket, of which all but the weights is fetched.

    Raises:
        OSError: when it cannot be read.
        ValueError: for a URL that is none of a bucket.
    """
    if not url.startswith(URLS):
        raise ValueError("give a folder, a hub id, s3:// or gs://")
    return Folder.at(url).fetch(light)


def _make_demo(output_directory: FolderLike, seed: int) -> RunInputs:
    """The demo's pairs, tokenizer and random base model, made once below the output directory."""
    home = (Folder.at(output_directory) / f"demo-{seed}").fetch()
    model, train, evals = home / "base-model", "train.jsonl", "eval.jsonl"
    with locked(home.make().path / ".lock"):
        if not (model.path / "config.json").exists():
            from transformers.utils.logging import disable_progress_bar

            from orpo_ray.demo.model import make_demo_model

            disable_progress_bar()
            write_demo_pairs(str(home.path), DEMO_TRAIN_PAIRS, DEMO_EVAL_PAIRS, seed)
            texts = []
            for pair in read_lines(home.path / train):
                texts += [pair["prompt"] + pair["chosen"], pair["prompt"] + pair["rejected"]]
            make_demo_model(str(model.path), texts, seed)
            home.publish(train, evals, model.name)
    source = ModelSource(model, model)
    files, eval_files = as_sources([f"{home}/{train}"]), as_sources([f"{home}/{evals}"])
    return RunInputs(files, {"eval_": eval_files}, source)


def _from_hub(config: ORPOConfig, output_directory: FolderLike) -> RunInputs:
    """The splits of a hub data set, kept as Parquet below the output directory."""
    from datasets import load_dataset

    data = config.data
    files: dict[str, tuple[str, ...]] = {}
    for prefix, split in (("", data.dataset_train_split), ("eval_", data.dataset_test_split)):
        if split:
            try:
                dataset = load_dataset(
                    data.dataset_name,
                    data.dataset_config,
                    split=split,
                    revision=data.dataset_revision,
                )
            except (OSError, ValueError) as error:  # datasets' own errors are one or the other
                problem = f"dataset_name: {data.dataset_name}: {first_line(error)}"
                raise DataError([problem]) from error
            files[prefix] = (keep_dataset(dataset, Folder.at(output_directory) / "inputs"),)
    evals = files.get("eval_", data.eval_files)
    local = config.replace(dataset_name=None, train_files=files[""], eval_files=evals)
    return find_inputs(local, output_directory)


def keep_dataset(dataset: Any, place: FolderLike) -> str:
    """Write a data set held in memory as one Parquet file, named by its content.

    Args:
        dataset: a `datasets.Dataset`, a Ray Dataset, a pandas frame, or a dict of lists.
        place: the folder; made if missing.

    Returns:
        The file's path, or its URL.

    Raises:
        DataError: for any other type.
    """
    import datasets
    import pandas
    import ray.data

    folder = Folder.at(place).make()
    if isinstance(dataset, ray.data.Dataset):
        return _keep_ray_dataset(dataset, folder)
    if isinstance(dataset, pandas.DataFrame):
        dataset = datasets.Dataset.from_pandas(dataset, preserve_index=False)
    if isinstance(dataset, Mapping):
        dataset = datasets.Dataset.from_dict(dict(dataset))
    if not isinstance(dataset, datasets.Dataset):
        raise DataError(
            [
                f"train_dataset: a {type(dataset).__name__} cannot be read; give a path, a hub id, "
                "a datasets.Dataset, a Ray Dataset, a pandas frame or a dict of lists"
            ]
        )
    name = f"{dataset._fingerprint}.parquet"
    if not (folder.path / name).exists():
        with folder.replacing(name) as temporary, no_progress_bars():
            dataset.to_parquet(str(temporary))
    return f"{folder}/{name}"


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """No progress bars of `datasets` on stderr."""
    import datasets

    were_hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_hidden:
            datasets.enable_progress_bars()


def _keep_ray_dataset(dataset: Any, folder: Folder) -> str:
    """Block by block in their order, so that no more than a few are in memory here."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    dataset.context.execution_options.preserve_order = True
    whole = dataset.materialize()

    def blocks() -> Any:
        return whole.iter_batches(batch_size=None, batch_format="pyarrow")

    # A block in which a column is null throughout does not know the column's type.
    schemas = [block.schema for block in blocks()]
    if not schemas:
        raise DataError(["train_dataset: the Ray Dataset has no row"])
    schema = pa.unify_schemas(schemas, promote_options="permissive")
    temporary = folder.path / f"ray-{os.getpid()}.tmp"
    with pq.ParquetWriter(temporary, schema) as writer:
        for block in blocks():
            writer.write_table(block.cast(schema))
    digest = xxhash.xxh3_128()
    with temporary.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    name = f"{digest.hexdigest()}.parquet"
    temporary.replace(folder.path / name)
    folder.publish(name)
    return f"{folder}/{name}"
