"""What every command does first: name the run, find its files, join Ray, ingest; on the driver.

What would be refused is refused before the next, slower step, and before anything is written into
the run directory.
"""

import dataclasses
import logging
import secrets
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from orpo_ray.config.data import DataSource
from orpo_ray.config.file import to_yaml
from orpo_ray.config.schema import ConfigError, ORPOConfig
from orpo_ray.dataset.ingest import held_out_set, ingest
from orpo_ray.dataset.request import TRAIN, IngestRequest, MapTasks
from orpo_ray.dataset.shards import TokenSet
from orpo_ray.orchestration.cluster import connection
from orpo_ray.orchestration.cluster.exposure import exposure_warning
from orpo_ray.orchestration.feed import FeedPlan, eval_plan, train_plan
from orpo_ray.orchestration.inputs import RunInputs, find_inputs
from orpo_ray.orchestration.preflight import check_model, check_optimizer, check_schedule
from orpo_ray.orchestration.tasks import map_tasks
from orpo_ray.preference.errors import DataError
from orpo_ray.preference.shapes import RowReader
from orpo_ray.preference.tokenization import Limits
from orpo_ray.reports.data import data_lines, refuse_bad_data, write_data_report
from orpo_ray.reports.data_page import constant_prompt_line, first_pair_lines
from orpo_ray.runs.files import CONFIG, holds_run
from orpo_ray.runs.manifest import NewerCheckpointError
from orpo_ray.runs.resume import ResumeError, newest_manifest, refuse_changes, with_batch_size
from orpo_ray.storage.folder import Folder
from orpo_ray.training.checkpoint.evaluations import Evaluations
from orpo_ray.training.errors import EvaluationError

_EVALUATED_GROUPS = 256
Config = TypeVar("Config", bound=ORPOConfig)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What every command has once its data is ingested.

    Args:
        config: settled by the cluster, with a run name and a global batch size.
        inputs: files and model.
        folder: the run directory.
        token_sets: by the name of the data set in the feed.
        data_report: what `data_report.json` holds.
    """

    config: ORPOConfig
    inputs: RunInputs
    folder: Folder
    token_sets: dict[str, TokenSet]
    data_report: dict[str, Any]

    @property
    def run_directory(self) -> Path:
        """Where the files of the run are on this node."""
        return self.folder.path

    def plans(self) -> dict[str, FeedPlan]:
        """The feed of every data set."""
        has_train = TRAIN in self.token_sets
        # Larger batches fill microbatches better; smaller ones do not delay training for long.
        per_worker = self.config.train.per_device_eval_batch_size
        per_worker = per_worker if has_train else max(per_worker, _EVALUATED_GROUPS)
        evals = {
            name: eval_plan(self.config, tokens, per_worker)
            for name, tokens in self.token_sets.items()
            if name != TRAIN
        }
        if not has_train:
            return evals
        return {TRAIN: self._train_plan()} | evals

    @property
    def n_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.total_steps(self.steps_per_epoch)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the training pairs."""
        train = self._train_plan()
        return train.order.n_batches(train.plan.batch_groups)

    def _train_plan(self) -> FeedPlan:
        weights = [source.weight for source in self.inputs.train_files]
        return train_plan(self.config, self.token_sets[TRAIN], weights)

    @property
    def data_digest(self) -> str:
        """Digest of the pairs that are trained on, which checkpoints record."""
        return self._train_plan().stream(0, 1).data_digest


def with_run_name(config: Config) -> Config:
    """The config with a name by the time where it has none; no two commands get the same."""
    if config.output.run_name:
        return config
    return config.replace(run_name=f"{time.strftime('orpo-%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}")


def run_directory_of(config: ORPOConfig) -> Folder:
    """The folder of a named run."""
    return Folder.at(config.output.output_dir) / str(config.output.run_name)


def start_run(
    config: ORPOConfig,
    inputs: RunInputs | None = None,
    only_evals: bool = False,
    trains: bool = True,
    refuse: Callable[[str], object] = lambda data_digest: None,
) -> Start:
    """Name the run, find its files, join the cluster, ingest, and write down all of it.

    Args:
        config: the run.
        inputs: files and model, when they are not those that the config names.
        only_evals: nothing is trained, and no training data is ingested.
        trains: whether the run is then trained. A command that does not leaves the config and the
            data report of a run as they are, and writes its own into a folder below.
        refuse: called with the digest of the training pairs before anything is written.

    Raises:
        ConfigError: for settings that the cluster cannot meet, for settings or data other than
            those of the run's checkpoint, and for a model that cannot be trained on the data.
        DataError: for missing files and when no usable row is left.
    """
    config = with_run_name(config)
    folder = run_directory_of(config)
    trains = trains and not only_evals
    try:
        manifest = newest_manifest(folder.path) if trains else None
    except NewerCheckpointError as error:
        raise ConfigError([str(error)]) from error
    config = _resumed(config, folder, manifest)
    inputs = inputs or find_inputs(config, folder.parent, only_evals)
    if trains:
        _refuse_unknown_metric(config, eval_names(config, inputs))
        check_schedule(config)
        check_optimizer(config)
    for name in config.orpo.unused():
        _log.warning("orpo.%s does nothing with objective=%s", name, config.orpo.objective)
    connection.connect()
    for warning in (connection.output_warning(folder), exposure_warning()):
        if warning:
            _log.warning(warning)
    config = connection.with_cluster(config)
    token_sets = ingest_all(config, inputs, folder.parent, only_evals)
    start = Start(config, inputs, folder, token_sets, {})
    if manifest is not None:
        _refuse_another_run(config, folder, manifest, start.data_digest)
    if trains:
        refuse(start.data_digest)
    check_model(config, inputs.model, token_sets)
    reports = folder
    if not trains and holds_run(folder.path):
        reports = folder / ("evaluation" if only_evals else "preparation")
        _log.info("%s holds a run: config and data report are in %s", folder, reports)
    report = _report_data(start, reports)
    if TRAIN in token_sets:
        tokenizer = _request(config, inputs, (), folder.parent).pair_tokenizer().tokenizer
        for line in first_pair_lines(token_sets[TRAIN], tokenizer, config.orpo):
            _log.info(line)
        constant = constant_prompt_line(token_sets[TRAIN], config.orpo.in_nll)
        if constant is not None:
            _log.warning(constant)
    reports.write_text(CONFIG, to_yaml(config))
    return dataclasses.replace(start, folder=folder if only_evals else reports, data_report=report)


def _resumed(config: ORPOConfig, run: Folder, manifest: Mapping[str, Any] | None) -> ORPOConfig:
    """The config with its pairs per step, for an attempt that the newest checkpoint allows.

    Raises:
        ConfigError: for settings other than those of the checkpoint.
    """
    settled = with_batch_size(config, manifest)
    if manifest is not None:
        _refuse_another_run(settled, run, manifest)
        if settled.pairs_per_step != config.pairs_per_step:
            _log.info("resuming with %s pairs per step, as before", settled.pairs_per_step)
    return settled


def _refuse_another_run(
    config: ORPOConfig, run: Folder, manifest: Mapping[str, Any], data_digest: str | None = None
) -> None:
    """Say before workers start what they would refuse.

    Raises:
        ConfigError: for settings or data other than those of the newest checkpoint.
    """
    try:
        refuse_changes(run, manifest, config, data_digest)
    except ResumeError as error:
        raise ConfigError(str(error).splitlines()) from error


def _refuse_unknown_metric(config: ORPOConfig, names: list[str]) -> None:
    """Say before workers start that no evaluation has the metric of the best model.

    Raises:
        ConfigError: naming those that there are.
    """
    try:
        Evaluations.from_config(config.train, names)
    except EvaluationError as error:
        raise ConfigError([str(error)]) from error


def _report_data(start: Start, place: Folder) -> dict[str, Any]:
    """Write and log the data report; that of data which is refused leaves an earlier one as it is.

    Raises:
        DataError: for what `refuse_bad_data` refuses.
    """
    problem: DataError | None = None
    refused = place / "refused" if holds_run(start.run_directory) else place
    try:
        refuse_bad_data(refused, start.token_sets, start.config)
    except DataError as error:
        place, problem = refused, error
    inputs, path = start.inputs, place.make().path
    report = write_data_report(
        path, start.token_sets, start.config, _names(inputs), inputs.passed_over
    )
    for name, figures in report.items():
        for line in data_lines(name, figures):
            _log.info(line)
    if problem is not None:
        raise problem
    return report


def ingest_all(
    config: ORPOConfig,
    inputs: RunInputs,
    output_directory: Folder,
    only_evals: bool,
    run_tasks: MapTasks = map_tasks,
) -> dict[str, TokenSet]:
    """The token set of every data set, by its name in the feed; the training set comes first."""
    data = config.data
    evals = {
        name: ingest(_request(config, inputs, sources, output_directory), run_tasks)
        for name, sources in inputs.eval_files.items()
    }
    if only_evals:
        return evals
    request = dataclasses.replace(
        _request(config, inputs, inputs.train_files, output_directory),
        val_set_size=data.val_set_size,
        subset_column=None,
        drop_duplicates=data.drop_duplicates,
        other_sets=tuple(t.folder for t in evals.values()) if data.drop_overlap else (),
    )
    train = ingest(request, run_tasks)
    if data.val_set_size:
        evals[_held_out_name(evals)] = held_out_set(train, data.val_set_size)
    return {TRAIN: train} | evals


def eval_names(config: ORPOConfig, inputs: RunInputs) -> list[str]:
    """The names of the evaluation sets in the feed, which are the prefixes of their metrics."""
    names = list(inputs.eval_files)
    return [*names, _held_out_name(names)] if config.data.val_set_size else names


def _held_out_name(others: Container[str]) -> str:
    """The name in the feed of what is held out of the training files."""
    names = ("eval_", "eval_held_out_", "eval_val_set_")
    return next(name for name in names if name not in others)


def _names(inputs: RunInputs) -> dict[str, str]:
    """What the user calls a file, where that is not its path, and one name in all data sets."""
    names: dict[str, set[str]] = {}
    for source in (*inputs.train_files, *(s for part in inputs.eval_files.values() for s in part)):
        names.setdefault(source.path, set()).add(source.name or "")
    return {path: min(given) for path, given in names.items() if len(given) == 1 and all(given)}


def _request(
    config: ORPOConfig,
    inputs: RunInputs,
    sources: tuple[DataSource, ...],
    output_directory: Folder,
) -> IngestRequest:
    data = config.data
    cache = Folder.at(data.token_cache_dir or output_directory / "token_cache")
    return IngestRequest(
        files=tuple(source.path for source in sources),
        tokenizer=inputs.model.tokenizer,
        revision=inputs.model.revision,
        limits=Limits(
            data.max_length, data.max_prompt_length, data.max_completion_length, data.truncation
        ),
        shard_rows=data.shard_rows,
        cache_directory=cache,
        reader=RowReader(
            tuple((data.column_mapping or {}).items()),
            data.min_score_gap,
            takes_one_answer=config.orpo.chosen_alone,
        ),
        chat_template=inputs.model.chat_template,
        special_tokens=data.special_tokens_in_text,
        template_drops=data.template_drops,
        template_date=data.template_date,
        group_by_prompt=data.group_by_prompt,
        subset_column=data.eval_subset_column,
        trust_remote_code=inputs.model.trust_remote_code,
    )
