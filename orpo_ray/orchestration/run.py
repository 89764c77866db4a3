"""The commands' one function each: from a config to a trained model; on the driver."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from orpo_ray.config import ORPOConfig
from orpo_ray.config_file import load_config, to_yaml
from orpo_ray.orchestration import cluster
from orpo_ray.orchestration.data_report import write_data_report
from orpo_ray.orchestration.feed import TRAIN, eval_plan, train_plan
from orpo_ray.orchestration.fit import Fit
from orpo_ray.orchestration.ingest import IngestRequest, ingest
from orpo_ray.orchestration.inputs import RunInputs, find_inputs
from orpo_ray.orchestration.progress import RunWatcher
from orpo_ray.orchestration.worker import evaluate_worker, train_worker
from orpo_ray.preference.errors import DataError
from orpo_ray.preference.shards import TokenSet
from orpo_ray.training.run_files import FINAL, summary

CONFIG = "config.yaml"


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Args:
        run_directory: absolute path; the README says what is in it.
        model_directory: the trained model, for `AutoModelForCausalLM.from_pretrained`.
        metrics: last logged training metrics and last evaluation.
        metrics_before: the evaluation before the first step; empty without evaluation data.
        data_report: rows read, kept and refused, by data set.
    """

    run_directory: str
    model_directory: str
    metrics: dict[str, float]
    metrics_before: dict[str, float] = field(default_factory=dict)
    data_report: dict[str, Any] = field(default_factory=dict)


def train(config: ORPOConfig, inputs: RunInputs | None = None) -> TrainResult:
    """Run ORPO as the config says, on the cluster at hand or on this machine.

    An existing run directory goes on from its newest checkpoint.

    Args:
        config: the run.
        inputs: files and model, when they are not those that the config names.

    Raises:
        ConfigError: for settings that the cluster or the run directory cannot meet.
        DataError: for missing files and when no usable row is left.
        TrainingError: for a loss that is not finite.
        ray.train.TrainingFailedError: when workers keep failing.
    """
    start = _start(config, inputs)
    config, console, run_directory = start.config, start.console, start.run_directory
    plans = {TRAIN: train_plan(config, start.token_sets[TRAIN])} | _eval_plans(start)
    problem = cluster.set_aside_broken_snapshot(run_directory)
    if problem:
        console.print(problem, markup=False)
    console.print(
        f"run directory: {run_directory}\n"
        f"starting {config.ray.num_workers} worker(s) with {config.ray.resources_per_worker}",
        markup=False,
    )
    steps_per_epoch = plans[TRAIN].order.n_batches(plans[TRAIN].plan.batch_groups)
    with RunWatcher(run_directory, config.total_steps(steps_per_epoch), console):
        Fit(config, start.inputs.model, run_directory, plans, start.data_report).run(train_worker)
    figures = summary(run_directory)
    result = TrainResult(
        run_directory=str(run_directory),
        model_directory=str(run_directory / FINAL),
        metrics=figures["train"] | figures["after"],
        metrics_before=figures["before"],
        data_report=start.data_report,
    )
    console.print(end_text(result, config), markup=False)
    return result


def evaluate(config: ORPOConfig, inputs: RunInputs | None = None) -> dict[str, float]:
    """Evaluate a model on the evaluation files; metric names start with `eval_`.

    Raises:
        ConfigError: for settings that the cluster cannot meet.
        DataError: for missing files, no evaluation data, and when no usable row is left.
    """
    start = _start(config, inputs, only_evals=True)
    if not start.token_sets:
        raise DataError(["eval_files: nothing to evaluate on; name files"])
    plans = _eval_plans(start)
    fit = Fit(start.config, start.inputs.model, start.run_directory / "evaluation", plans)
    return fit.run(evaluate_worker).figures["after"]


def prepare(config: ORPOConfig) -> dict[str, Any]:
    """Ingest only: token shards into the cache, a report into the run directory.

    Returns:
        What `data_report.json` holds.

    Raises:
        DataError: for missing files and when no usable row is left.
    """
    start = _start(config, None)
    start.console.print(f"data report: {start.run_directory}/data_report.json", markup=False)
    return start.data_report


@dataclass(frozen=True)
class _Start:
    """What every command has once its data is ingested."""

    config: ORPOConfig
    inputs: RunInputs
    run_directory: Path
    token_sets: dict[str, TokenSet]
    data_report: dict[str, Any]
    console: Console


def _start(config: ORPOConfig, inputs: RunInputs | None, only_evals: bool = False) -> _Start:
    """Name the run, find its files, join the cluster, ingest, and write down all of it."""
    console = Console(highlight=False, soft_wrap=True)
    if not config.output.run_name:
        config = config.replace(run_name=time.strftime("orpo-%Y%m%d-%H%M%S"))
    output_directory = Path(config.output.output_dir).expanduser().resolve()
    run_directory = output_directory / str(config.output.run_name)
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
    run_directory.mkdir(parents=True, exist_ok=True)
    write_data_report(
        str(run_directory), {name.rstrip("_"): tokens for name, tokens in token_sets.items()}
    )
    (run_directory / CONFIG).write_text(to_yaml(config))
    report = json.loads((run_directory / "data_report.json").read_text())
    return _Start(config, inputs, run_directory, token_sets, report, console)


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


def _eval_plans(start: _Start) -> dict[str, Any]:
    return {
        name: eval_plan(start.config, tokens)
        for name, tokens in start.token_sets.items()
        if name != TRAIN
    }


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


def end_text(result: TrainResult, config: ORPOConfig) -> str:
    """The end of a run on a few lines: what came of it, where it is, what to try next."""
    before, after = result.metrics_before, result.metrics
    lines = [f"loss {after['loss']:.4f} at step {after['step']}"] if "loss" in after else []
    accuracy, log_odds = "eval_rewards/accuracies", "eval_log_odds_chosen"
    if accuracy in before:
        lines.append(
            f"held-out reward accuracy: {before[accuracy]:.3f} before, {after[accuracy]:.3f} after"
        )
        lines.append(
            f"held-out log odds: {before[log_odds]:+.3f} before, {after[log_odds]:+.3f} after"
        )
    lines += [f"run directory: {result.run_directory}", f"model: {result.model_directory}"]
    if config.data.train_files is None:
        lines.append(
            "next: python jobs/train.py beta=0 run_name=without-odds-ratio   "
            "(the same without the odds-ratio term)"
        )
    else:
        lines.append(
            f"next: python jobs/train.py ... run_name={config.output.run_name} with a higher "
            "max_steps or num_train_epochs goes on from here"
        )
    return "\n".join(lines)
