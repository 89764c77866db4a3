"""What every command does first: name the run, find its files, join Ray, ingest; on the driver."""

import dataclasses
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo_ray.config.data import DataSource
from orpo_ray.config.file import load_config, to_yaml
from orpo_ray.config.schema import ConfigError, ORPOConfig
from orpo_ray.dataset.ingest import held_out_set, ingest
from orpo_ray.dataset.request import TRAIN, IngestRequest
from orpo_ray.dataset.shards import TokenSet
from orpo_ray.orchestration import cluster
from orpo_ray.orchestration.exposure import exposure_warning
from orpo_ray.orchestration.feed import FeedPlan, eval_plan, train_plan
from orpo_ray.orchestration.inputs import RunInputs, find_inputs
from orpo_ray.orchestration.preflight import check_model
from orpo_ray.orchestration.tasks import map_tasks
from orpo_ray.preference.shapes import RowReader
from orpo_ray.preference.tokenization import Limits
from orpo_ray.reports.data import data_lines, first_pair_lines, refuse_bad_data, write_data_report
from orpo_ray.runs.files import CONFIG
from orpo_ray.runs.resume import ResumeError, decisive_settings, newest_manifest, refuse_changes
from orpo_ray.storage.folder import Folder

_EVALUATED_GROUPS = 256
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
        train = self._train_plan()
        return self.config.total_steps(train.order.n_batches(train.plan.batch_groups))

    def _train_plan(self) -> FeedPlan:
        weights = [source.weight for source in self.inputs.train_files]
        return train_plan(self.config, self.token_sets[TRAIN], weights)

    def refuse_another_run(self) -> None:
        """Say before workers start what they would refuse, and before anything is written over.

        Raises:
            ConfigError: for settings or data other than those of the newest checkpoint.
        """
        manifest = newest_manifest(self.run_directory)
        if manifest is None or TRAIN not in self.token_sets or self.config.train.resume_changed:
            return
        digest = self._train_plan().stream(0, 1).data_digest
        try:
            refuse_changes(manifest, decisive_settings(self.config, digest))
        except ResumeError as error:
            raise ConfigError(str(error).splitlines()) from error


def with_run_name(config: ORPOConfig) -> ORPOConfig:
    """The config with a name by the time where it has none."""
    if config.output.run_name:
        return config
    return config.replace(run_name=time.strftime("orpo-%Y%m%d-%H%M%S"))


def run_directory_of(config: ORPOConfig) -> Folder:
    """The folder of a named run."""
    return Folder.at(config.output.output_dir) / str(config.output.run_name)


def start_run(
    config: ORPOConfig,
    inputs: RunInputs | None = None,
    only_evals: bool = False,
) -> Start:
    """Name the run, find its files, join the cluster, ingest, and write down all of it.

    Raises:
        ConfigError: for settings that the cluster cannot meet, for settings or data other than
            those of the run's checkpoint, and for a model that cannot be trained on the data.
        DataError: for missing files and when no usable row is left.
    """
    config = with_run_name(config)
    folder = run_directory_of(config)
    run_directory, output_directory = folder.path, folder.parent
    config = _with_batch_size(config, run_directory)
    inputs = inputs or find_inputs(config, output_directory, only_evals)
    cluster.connect()
    warning = exposure_warning()
    if warning:
        _log.warning(warning)
    config = cluster.with_cluster(config)
    token_sets = ingest_all(config, inputs, output_directory, only_evals)
    start = Start(config, inputs, folder, token_sets, {})
    start.refuse_another_run()
    check_model(config, inputs.model, token_sets)
    folder.make()
    report = write_data_report(
        run_directory, token_sets, config, _names(inputs), inputs.passed_over
    )
    for name, figures in report.items():
        for line in data_lines(name, figures):
            _log.info(line)
    refuse_bad_data(folder, token_sets, config)
    if TRAIN in token_sets:
        tokenizer = _request(config, inputs, (), output_directory).pair_tokenizer().tokenizer
        for line in first_pair_lines(token_sets[TRAIN], tokenizer, config.orpo.nll_scope):
            _log.info(line)
    folder.write_text(CONFIG, to_yaml(config))
    return dataclasses.replace(start, data_report=report)


def ingest_all(
    config: ORPOConfig, inputs: RunInputs, output_directory: Folder, only_evals: bool
) -> dict[str, TokenSet]:
    """The token set of every data set, by its name in the feed; the training set comes first."""
    data = config.data
    evals = {
        name: ingest(_request(config, inputs, sources, output_directory), map_tasks)
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
    train = ingest(request, map_tasks)
    if data.val_set_size:
        free = [name for name in ("eval_", "eval_held_out_", "eval_val_set_") if name not in evals]
        evals[free[0]] = held_out_set(train, data.val_set_size)
    return {TRAIN: train} | evals


def _names(inputs: RunInputs) -> dict[str, str]:
    """What the user calls a file, where that is not its path, and one name in all data sets."""
    names: dict[str, set[str]] = {}
    for source in (*inputs.train_files, *(s for part in inputs.eval_files.values() for s in part)):
        names.setdefault(source.path, set()).add(source.name or "")
    return {path: min(given) for path, given in names.items() if len(given) == 1 and all(given)}


def _with_batch_size(config: ORPOConfig, run_directory: Path) -> ORPOConfig:
    """Set the pairs per step; a run that resumes with other workers keeps what it had."""
    earlier = run_directory / CONFIG
    if config.train.global_batch_size is None and earlier.exists():
        before = load_config(str(earlier), [])
        shares = ("per_device_train_batch_size", "gradient_accumulation_steps")
        same_shares = all(getattr(before.train, n) == getattr(config.train, n) for n in shares)
        if same_shares and before.pairs_per_step != config.pairs_per_step:
            _log.info("resuming with %s pairs per step, as before", before.pairs_per_step)
            return config.replace(global_batch_size=before.pairs_per_step)
    return config.replace(global_batch_size=config.pairs_per_step)


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
        reader=RowReader(tuple((data.column_mapping or {}).items()), data.min_score_gap),
        chat_template=inputs.model.chat_template,
        special_tokens=data.special_tokens_in_text,
        template_drops=data.template_drops,
        template_date=data.template_date,
        group_by_prompt=data.group_by_prompt,
        subset_column=data.eval_subset_column,
        trust_remote_code=inputs.model.trust_remote_code,
    )
