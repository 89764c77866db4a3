"""One trial of a sweep: a training run with some settings of its own; in Tune's trial actors."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import ray.tune
from ray.train import TrainingFailedError
from ray.tune.integration.ray_train import TuneReportCallback
from rich.console import Console

from orpo_ray.config.file import to_yaml
from orpo_ray.config.schema import ConfigError, ORPOConfig, settings_that_decide
from orpo_ray.orchestration.cluster import set_aside_broken_snapshot
from orpo_ray.orchestration.start import Start, make_console, start_run
from orpo_ray.orchestration.trackers import Trackers
from orpo_ray.orchestration.workers import Fit, TrainingError, train_worker
from orpo_ray.preference.errors import DataError
from orpo_ray.reports.card import write_model_card
from orpo_ray.reports.live import RunWatcher
from orpo_ray.runs.files import CONFIG, TRIAL_RECORD, TRIALS
from orpo_ray.runs.mirror import working_on
from orpo_ray.storage.bucket import address, make_folder
from orpo_ray.storage.files import first_line, read_json, write_json
from orpo_ray.storage.mirror import publish


def trial_function(start: Start) -> Callable[[dict[str, Any]], None]:
    """What Ray Tune calls with the values of a trial; `start` is of the whole sweep."""

    def trial(values: dict[str, Any]) -> None:
        name = ray.tune.get_context().get_trial_id()
        run_trial(start, name, values, (TuneReportCallback(),))

    return trial


def run_trial(
    start: Start, name: str, values: Mapping[str, Any], callbacks: tuple[Any, ...] = ()
) -> None:
    """Train one trial, from its newest checkpoint if it has one.

    Why it failed is written into its folder as well, unless it was ended from outside.
    """
    trials = start.run_directory / TRIALS
    directory = trials / name
    make_folder(directory)
    record = {"trial": name, "values": dict(values)}
    _write(directory, record)
    try:
        config = trial_config(start.config, values).replace(
            run_name=name,
            output_dir=address(trials),
            token_cache_dir=start.config.data.token_cache_dir
            or address(start.run_directory.parent / "token_cache"),
        )
        trial = dataclasses.replace(start, config=config, run_directory=directory)
        if settings_that_decide("tokens") & values.keys():
            trial = start_run(_with_found_inputs(config, start, values), make_console())
        (directory / CONFIG).write_text(to_yaml(trial.config))
        publish(directory / CONFIG)
        set_aside_broken_snapshot(directory)
        fit = Fit(trial.config, trial.inputs.model, directory, trial.plans(), callbacks)
        with _tracked(fit):
            fit.run(train_worker)
        write_model_card(directory, trial.config, trial.data_report)
    except (ConfigError, DataError, TrainingError, TrainingFailedError) as error:
        _write(directory, record | {"failure": first_line(error)})
        raise


@contextmanager
def _tracked(fit: Fit) -> Iterator[None]:
    """Send a trial's metrics to the trackers that it reports to, each as a run of its own."""
    if not fit.config.output.report_to:
        yield
        return
    console = Console(quiet=True)
    with (
        working_on(fit.run_directory),
        closing(Trackers(fit.config, fit.run_directory, console)) as trackers,
        RunWatcher(fit.run_directory, 0, console, log=trackers.log),
    ):
        yield


def trial_config(config: ORPOConfig, values: Mapping[str, Any]) -> ORPOConfig:
    """The sweep's config with a trial's values; a searched batch size counts."""
    shares = {"per_device_train_batch_size", "gradient_accumulation_steps"}
    if shares & values.keys() and "global_batch_size" not in values:
        config = config.replace(global_batch_size=None)
        config = config.replace(**values)
        return config.replace(global_batch_size=config.pairs_per_step)
    return config.replace(**values)


def _with_found_inputs(config: ORPOConfig, start: Start, values: Mapping[str, Any]) -> ORPOConfig:
    """Name what the sweep found by its absolute path: a trial has a working folder of its own."""
    found: dict[str, Any] = {"model_name_or_path": start.inputs.model.model}
    if config.data.dataset_name is None:
        evals = [source for sources in start.inputs.eval_files.values() for source in sources]
        found |= {"train_files": start.inputs.train_files, "eval_files": evals or None}
    return config.replace(**{name: path for name, path in found.items() if name not in values})


def record_failure(directory: Path, reason: str) -> None:
    """Say in a trial's folder why it failed, unless it says so itself."""
    record = read_json(directory / TRIAL_RECORD)
    _write(directory, {"failure": reason} | record)


def _write(directory: Path, record: Mapping[str, Any]) -> None:
    write_json(directory / TRIAL_RECORD, record)
    publish(directory / TRIAL_RECORD)
