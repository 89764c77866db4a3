"""The commands' one function each: from a config to a trained model; on the driver."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

import orpo_ray
from orpo_ray.config import ConfigError, ORPOConfig
from orpo_ray.orchestration import cluster
from orpo_ray.orchestration.data_report import write_data_report
from orpo_ray.orchestration.feed import TRAIN, FeedPlan, PlannedFeed, eval_plan, train_plan
from orpo_ray.orchestration.ingest import IngestRequest, ingest
from orpo_ray.orchestration.inputs import RunInputs, find_inputs
from orpo_ray.orchestration.progress import RunWatcher
from orpo_ray.preference.shards import TokenSet
from orpo_ray.training.loop import FINAL, total_steps
from orpo_ray.training.run_files import summary


class TrainingError(RuntimeError):
    """Training stopped for a reason of its own, which another attempt would meet again."""


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Args:
        run_directory: absolute path; see the README for what is in it.
        model_directory: the trained model, for `AutoModelForCausalLM.from_pretrained`.
        metrics: last logged training metrics and last evaluation.
        metrics_before: the evaluation before the first step; empty without evaluation data.
        data_report: rows read, kept and refused.
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
    console = Console(highlight=False, soft_wrap=True)
    config = _named(config)
    run_directory = _run_directory(config)
    inputs = inputs or find_inputs(config, run_directory.parent)
    cluster.connect()
    config = cluster.with_cluster(config)
    token_sets = _ingest_all(config, inputs, run_directory.parent, console)
    _write_start(run_directory, config, token_sets)
    plans = {TRAIN: train_plan(config, token_sets[TRAIN])} | {
        name: eval_plan(config, tokens) for name, tokens in token_sets.items() if name != TRAIN
    }
    _fit(config, inputs, run_directory, plans, console)
    result = _result(run_directory)
    _print_end(result, config, console)
    return result


def prepare(config: ORPOConfig) -> dict[str, Any]:
    """Ingest only: token shards into the cache, a report into the run directory.

    Returns:
        What `data_report.json` holds.

    Raises:
        DataError: for missing files and when no usable row is left.
    """
    console = Console(highlight=False, soft_wrap=True)
    config = _named(config)
    run_directory = _run_directory(config)
    inputs = find_inputs(config, run_directory.parent)
    cluster.connect()
    token_sets = _ingest_all(config, inputs, run_directory.parent, console)
    _write_start(run_directory, config, token_sets)
    console.print(f"data report: {run_directory}/data_report.json", markup=False)
    return {name: tokens.report for name, tokens in token_sets.items()}


def _named(config: ORPOConfig) -> ORPOConfig:
    """A run without a name gets the time as one."""
    if config.output.run_name:
        return config
    return config.replace(run_name=time.strftime("orpo-%Y%m%d-%H%M%S"))


def _run_directory(config: ORPOConfig) -> Path:
    directory = Path(config.output.output_dir).expanduser().resolve()
    return directory / (config.output.run_name or "")


def _ingest_all(
    config: ORPOConfig, inputs: RunInputs, output_directory: Path, console: Console
) -> dict[str, TokenSet]:
    """Token sets by name: `train`, and one an evaluation set, named by its metric prefix."""
    cache = config.data.token_cache_dir or str(output_directory / "token_cache")
    token_sets = {}
    for name, files in {TRAIN: inputs.train_files, **inputs.eval_files}.items():
        request = IngestRequest(
            files=tuple(files),
            tokenizer=inputs.model.tokenizer,
            revision=inputs.model.revision,
            max_length=config.data.max_length,
            shard_rows=config.data.shard_rows,
            cache_directory=str(Path(cache).expanduser().resolve()),
        )
        token_sets[name] = tokens = ingest(request)
        report = tokens.report
        refused = ", ".join(f"{count} {reason}" for reason, count in report["refused"].items())
        console.print(
            f"{name.rstrip('_')} data: {report['rows_read']} rows read, {report['rows_kept']} kept"
            + (f", refused: {refused}" if refused else ""),
            markup=False,
        )
    return token_sets


def _write_start(run_directory: Path, config: ORPOConfig, token_sets: dict[str, TokenSet]) -> None:
    """What the run directory holds before training starts."""
    run_directory.mkdir(parents=True, exist_ok=True)
    write_data_report(
        str(run_directory), {name.rstrip("_"): tokens for name, tokens in token_sets.items()}
    )
    from orpo_ray.config import to_yaml

    (run_directory / "config.yaml").write_text(to_yaml(config))


def _fit(
    config: ORPOConfig,
    inputs: RunInputs,
    run_directory: Path,
    plans: dict[str, FeedPlan],
    console: Console,
) -> None:
    """Train under Ray Train, showing the run as it goes."""
    from ray.train.torch import TorchConfig, TorchTrainer

    from orpo_ray.orchestration.worker import WorkerAnswer, WorkerTask, train_worker

    problem = cluster.set_aside_broken_snapshot(run_directory)
    if problem:
        console.print(problem, markup=False)
    task = WorkerTask(
        config=config,
        model=inputs.model,
        run_directory=str(run_directory),
        evals={name: name for name in plans if name != TRAIN},
        data_report=json.loads((run_directory / "data_report.json").read_text()),
        version=orpo_ray.__version__,
    )
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"task": task},
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if config.ray.use_gpu else "gloo"),
        scaling_config=cluster.scaling(config),
        run_config=cluster.run_settings(config, run_directory),
        datasets={name: plan.shard_list() for name, plan in plans.items()},
        dataset_config=PlannedFeed(plans),
    )
    steps_per_epoch = plans[TRAIN].order.n_batches(plans[TRAIN].plan.batch_groups)
    console.print(
        f"run directory: {run_directory}\n"
        f"starting {config.ray.num_workers} worker(s) on {config.ray.resources_per_worker}",
        markup=False,
    )
    with RunWatcher(run_directory, total_steps(config, steps_per_epoch), console):
        answer: WorkerAnswer = trainer.fit().return_value
    if answer.refusal:
        raise ConfigError([answer.refusal])
    if answer.failure:
        raise TrainingError(answer.failure)


def _result(run_directory: Path) -> TrainResult:
    figures = summary(run_directory)
    return TrainResult(
        run_directory=str(run_directory),
        model_directory=str(run_directory / FINAL),
        metrics=figures["train"] | figures["after"],
        metrics_before=figures["before"],
        data_report=json.loads((run_directory / "data_report.json").read_text()),
    )


def _print_end(result: TrainResult, config: ORPOConfig, console: Console) -> None:
    """The end of a run on a few lines: what came of it, where it is, what to try next."""
    before, after = result.metrics_before, result.metrics
    lines = [f"loss {after['loss']:.4f} at step {after['step']}"] if "loss" in after else []
    name = "rewards/accuracies"
    if f"eval_{name}" in before:
        lines.append(
            f"held-out reward accuracy {before[f'eval_{name}']:.3f} before, "
            f"{after[f'eval_{name}']:.3f} after; "
            f"log odds {before['eval_log_odds_chosen']:+.3f} before, "
            f"{after['eval_log_odds_chosen']:+.3f} after"
        )
    lines += [f"run directory: {result.run_directory}", f"model: {result.model_directory}"]
    if config.data.train_files is None:
        lines.append(
            "next: python jobs/train.py beta=0 run_name=without-odds-ratio, to see what the "
            "odds-ratio term does; or train_files=YOUR.jsonl model_name_or_path=YOUR/MODEL"
        )
    else:
        lines.append(
            "next: AutoModelForCausalLM.from_pretrained(the model folder above), or the same "
            f"command with run_name={config.output.run_name} and more steps to go on"
        )
    console.print("\n".join(lines), markup=False)
