"""What every command does first: name the run, find its files, join Ray, ingest; on the driver."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from orpo_ray.config import ConfigError, ORPOConfig
from orpo_ray.config_file import load_config, to_yaml
from orpo_ray.orchestration import cluster
from orpo_ray.orchestration.data_report import write_data_report
from orpo_ray.orchestration.feed import TRAIN, FeedPlan, eval_plan, train_plan
from orpo_ray.orchestration.ingest import IngestRequest, ingest
from orpo_ray.orchestration.inputs import RunInputs, find_inputs
from orpo_ray.preference.shards import TokenSet
from orpo_ray.training.errors import ResumeError
from orpo_ray.training.resume import decisive_settings, newest_manifest, refuse_changes

CONFIG = "config.yaml"


def make_console() -> Console:
    """Where a command prints: plain, unwrapped lines."""
    return Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Start:
    """What every command has once its data is ingested.

    Args:
        config: settled by the cluster, with a run name and a global batch size.
        inputs: files and model.
        run_directory: absolute path.
        token_sets: by the name of the data set in the feed.
        data_report: what `data_report.json` holds.
    """

    config: ORPOConfig
    inputs: RunInputs
    run_directory: Path
    token_sets: dict[str, TokenSet]
    data_report: dict[str, Any]

    def plans(self) -> dict[str, FeedPlan]:
        """The feed of every data set."""
        evals = {
            name: eval_plan(self.config, tokens)
            for name, tokens in self.token_sets.items()
            if name != TRAIN
        }
        if TRAIN not in self.token_sets:
            return evals
        return {TRAIN: train_plan(self.config, self.token_sets[TRAIN])} | evals


def with_run_name(config: ORPOConfig) -> ORPOConfig:
    """The config with a name by the time where it has none."""
    if config.output.run_name:
        return config
    return config.replace(run_name=time.strftime("orpo-%Y%m%d-%H%M%S"))


def run_directory_of(config: ORPOConfig) -> Path:
    """Absolute path of a named run."""
    return Path(config.output.output_dir).expanduser().resolve() / str(config.output.run_name)


def start_run(
    config: ORPOConfig,
    console: Console,
    inputs: RunInputs | None = None,
    only_evals: bool = False,
) -> Start:
    """Name the run, find its files, join the cluster, ingest, and write down all of it.

    Raises:
        ConfigError: for settings that the cluster cannot meet, and for settings or data other
            than those of the run's checkpoint.
        DataError: for missing files and when no usable row is left.
    """
    config = with_run_name(config)
    run_directory = run_directory_of(config)
    output_directory = run_directory.parent
    config = _with_batch_size(config, run_directory, console)
    inputs = inputs or find_inputs(config, output_directory)
    cluster.connect()
    config = cluster.with_cluster(config)
    files = dict(inputs.eval_files) if only_evals else {TRAIN: inputs.train_files}
    files |= inputs.eval_files
    token_sets = {}
    for name, paths in files.items():
        tokens = ingest(_request(config, inputs, paths, output_directory))
        token_sets[name] = tokens
        console.print(_counts_text(name.rstrip("_"), tokens.report), markup=False)
    if TRAIN in token_sets:
        _refuse_another_run(config, run_directory, token_sets[TRAIN])
    run_directory.mkdir(parents=True, exist_ok=True)
    write_data_report(
        str(run_directory), {name.rstrip("_"): tokens for name, tokens in token_sets.items()}
    )
    (run_directory / CONFIG).write_text(to_yaml(config))
    report = json.loads((run_directory / "data_report.json").read_text())
    return Start(config, inputs, run_directory, token_sets, report)


def _refuse_another_run(config: ORPOConfig, run_directory: Path, tokens: TokenSet) -> None:
    """Say before workers start what they would refuse, and before anything is written over."""
    manifest = newest_manifest(run_directory)
    if manifest is None or config.train.resume_changed:
        return
    try:
        refuse_changes(manifest, decisive_settings(config, tokens.digest))
    except ResumeError as error:
        raise ConfigError(str(error).splitlines()) from error


def _with_batch_size(config: ORPOConfig, run_directory: Path, console: Console) -> ORPOConfig:
    """Settle the pairs of a step; a run that goes on with other workers keeps those it had."""
    earlier = run_directory / CONFIG
    if config.train.global_batch_size is None and earlier.exists():
        before = load_config(str(earlier), [])
        shares = ("per_device_train_batch_size", "gradient_accumulation_steps")
        same_shares = all(getattr(before.train, n) == getattr(config.train, n) for n in shares)
        if same_shares and before.pairs_per_step != config.pairs_per_step:
            console.print(f"going on with {before.pairs_per_step} pairs a step, as before")
            return config.replace(global_batch_size=before.pairs_per_step)
    return config.replace(global_batch_size=config.pairs_per_step)


def _request(
    config: ORPOConfig, inputs: RunInputs, paths: tuple[str, ...], output_directory: Path
) -> IngestRequest:
    cache = Path(config.data.token_cache_dir or output_directory / "token_cache")
    return IngestRequest(
        files=tuple(paths),
        tokenizer=inputs.model.tokenizer,
        revision=inputs.model.revision,
        max_length=config.data.max_length,
        shard_rows=config.data.shard_rows,
        cache_directory=str(cache.expanduser().resolve()),
        group_by_prompt=config.data.group_by_prompt,
    )


def _counts_text(name: str, report: Mapping[str, Any]) -> str:
    """What ingest counted, on one line."""
    refused = ", ".join(f"{count} {reason}" for reason, count in report["refused"].items())
    text = f"{name} data: {report['rows_read']} rows read, {report['rows_kept']} kept"
    return f"{text}, refused: {refused}" if refused else text
