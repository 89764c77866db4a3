"""One trial of a sweep: a training run with some settings of its own; in Tune's trial actors."""

import dataclasses
import threading
from collections.abc import Callable, Mapping
from typing import Any

import ray.tune
from ray.train import TrainingFailedError
from ray.tune.integration.ray_train import TuneReportCallback

from orpo_ray.config.file import to_yaml
from orpo_ray.config.schema import ConfigError, ORPOConfig, settings_that_decide
from orpo_ray.orchestration.start import Start, start_run
from orpo_ray.orchestration.sweep.search_space import trial_values
from orpo_ray.orchestration.train import train_run
from orpo_ray.preference.errors import DataError
from orpo_ray.runs.files import CONFIG, STOP, TRIAL_RECORD, TRIALS
from orpo_ray.runs.mirror import working_on
from orpo_ray.storage.files import first_line, read_json
from orpo_ray.storage.folder import Folder
from orpo_ray.training.errors import StoppedError, TrainingError


def trial_function(start: Start) -> Callable[[dict[str, Any]], None]:
    """What Ray Tune calls with the values of a trial; `start` is of the whole sweep."""

    def trial(values: dict[str, Any]) -> None:
        name = ray.tune.get_context().get_trial_id()
        try:
            run_trial(start, name, values, (TuneReportCallback(),))
        except StoppedError:
            # The sweep is being stopped. Only what Ray Tune takes for running does it resume.
            threading.Event().wait()

    return trial


def run_trial(
    start: Start, name: str, values: Mapping[str, Any], callbacks: tuple[Any, ...] = ()
) -> None:
    """Train one trial, from its newest checkpoint if it has one.

    Why it failed or where it was stopped is written into its folder as well, unless it was ended
    from outside.
    """
    values = trial_values(start.config, values)
    folder = (start.folder / TRIALS / name).make()
    folder.remove(STOP)
    record = {"trial": name, "values": dict(values)}
    folder.write_json(TRIAL_RECORD, record)
    try:
        with working_on(folder):
            train_run(_start(start, folder, values), callbacks=callbacks)
    except StoppedError as error:
        folder.write_json(TRIAL_RECORD, record | {"stopped": str(error)})
        raise
    except (ConfigError, DataError, TrainingError, TrainingFailedError) as error:
        folder.write_json(TRIAL_RECORD, record | {"failure": first_line(error)})
        raise


def _start(sweep: Start, folder: Folder, values: Mapping[str, Any]) -> Start:
    """The sweep's start with a trial's settings; the trial ingests where they change its inputs."""
    config = trial_config(sweep.config, values).replace(
        run_name=folder.name,
        output_dir=folder.parent.address,
        token_cache_dir=sweep.config.data.token_cache_dir
        or (sweep.folder.parent / "token_cache").address,
    )
    takes_one = [c.orpo.chosen_alone for c in (sweep.config, config)]
    if settings_that_decide("tokens") & values.keys() or takes_one == [True, False]:
        return start_run(_with_found_inputs(config, sweep, values))
    folder.write_text(CONFIG, to_yaml(config))
    return dataclasses.replace(sweep, config=config, folder=folder)


def trial_config(config: ORPOConfig, values: Mapping[str, Any]) -> ORPOConfig:
    """The sweep's config with a trial's values; a searched batch size counts.

    Args:
        config: of the sweep.
        values: as Ray Tune drew them, or as the trial's record has them.
    """
    values = trial_values(config, values)
    shares = {"per_device_train_batch_size", "gradient_accumulation_steps"}
    if shares & values.keys() and "global_batch_size" not in values:
        config = config.replace(global_batch_size=None)
        config = config.replace(**values)
        return config.replace(global_batch_size=config.pairs_per_step)
    return config.replace(**values)


def _with_found_inputs(config: ORPOConfig, start: Start, values: Mapping[str, Any]) -> ORPOConfig:
    """Name what the sweep found by its absolute path: a trial has a working folder of its own."""
    found: dict[str, Any] = {"model_name_or_path": str(start.inputs.model.model)}
    if config.data.dataset_name is None:
        evals = [source for sources in start.inputs.eval_files.values() for source in sources]
        found |= {"train_files": start.inputs.train_files, "eval_files": evals or None}
    return config.replace(**{name: path for name, path in found.items() if name not in values})


def record_failure(trial: Folder, reason: str) -> None:
    """Say in a trial's folder why it failed, unless it says so itself."""
    record = read_json(trial.path / TRIAL_RECORD)
    trial.write_json(TRIAL_RECORD, {"failure": reason} | record)
