"""A sweep: Ray Tune over training runs, from one config to a champion; on the driver."""

import logging
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import ray
from ray import tune as ray_tune
from rich.console import Console

from orpo_ray.config.file import to_yaml
from orpo_ray.config.schema import ConfigError, ORPOConfig
from orpo_ray.orchestration.cluster import connection
from orpo_ray.orchestration.inputs import RunInputs, find_inputs
from orpo_ray.orchestration.start import (
    Start,
    eval_names,
    run_directory_of,
    start_run,
    with_run_name,
)
from orpo_ray.orchestration.sweep.earlier import SweepPart, refuse_another_sweep, sweep_parts
from orpo_ray.orchestration.sweep.running import TrialEnds, stopping_trials
from orpo_ray.orchestration.sweep.search_space import search_space
from orpo_ray.orchestration.sweep.strategies import (
    concurrent_trials,
    search_algorithm,
    trial_scheduler,
)
from orpo_ray.orchestration.sweep.trial import (
    record_failure,
    run_trial,
    trial_config,
    trial_function,
)
from orpo_ray.orchestration.trackers import refuse_missing
from orpo_ray.orchestration.train import stopping_on_signals
from orpo_ray.preference.errors import DataError
from orpo_ray.reports.live_sweep import SweepWatcher, trial_text
from orpo_ray.reports.sweep import write_sweep_report
from orpo_ray.runs.files import FINAL, TRIAL_RECORD, TRIALS
from orpo_ray.runs.lock import claimed
from orpo_ray.runs.mirror import refresh, working_on
from orpo_ray.runs.sweep import Goal, Trial, goal_problems, read_trials, table_rows
from orpo_ray.training.errors import StoppedError

BETA_ZERO = "beta-0"
CHAMPION, BEST_CONFIG = "champion", "best_config.yaml"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep.

    Args:
        directory: absolute path or URL; `docs/sweeps.md` lists its files.
        best: the best trial, or None when none is left under the guard.
        trials: all trials, the best first.
        model_directory: the best trial's model.
        report: path or URL of `sweep_report.html`.
    """

    directory: str
    best: Trial | None
    trials: list[Trial]
    model_directory: str | None
    report: str

    @property
    def has_failed(self) -> bool:
        """Whether every trial failed."""
        return bool(self.trials) and all(trial.failure for trial in self.trials)


def trainable(config: ORPOConfig) -> Callable[[dict[str, Any]], None]:
    """A function of a trial's values for a `ray.tune.Tuner` of one's own; ingests once, here.

    It reports at every evaluation, with `step` beside the metrics. Its runs are kept in
    `<output_dir>/<run_name>/trials/`.
    """
    connection.connect(dashboard=True)
    return trial_function(_with_evaluations(start_run(_one_cpu_each(config))))


def tune(
    config: ORPOConfig, space: Mapping[str, Any] | None = None, console: Console | None = None
) -> SweepResult:
    """Search the settings that `search` names, and keep the best trial's model and config.

    The same run name resumes a sweep that was interrupted: finished trials are kept, those that
    were running resume from their checkpoints.

    Args:
        config: of every trial, but for what is searched.
        space: domains of `ray.tune` by setting, instead of what `config.search` says.
        console: shows the trials in a live table if it is a terminal. Default: they are only
            logged, by the logger `orpo_ray`.

    Raises:
        ConfigError: for a search or a goal that makes no sense, and what `train` refuses.
        DataError: for missing files, no usable row, and no evaluation data.
        StoppedError: when this process got SIGTERM or SIGHUP, once every running trial has saved a
            checkpoint.
        KeyboardInterrupt: on Ctrl-C, likewise, but for a second one.
    """
    refuse_missing(config.output.report_to)
    problems: list[str] = []
    try:
        space = dict(space or search_space(config))
    except ConfigError as error:
        space, problems = {}, list(error.lines)
    problems += [*goal_problems(config, space), *_repeat_problems(config, space)]
    if problems:
        raise ConfigError(problems)
    goal = Goal.from_config(config)
    if "objective" in space:  # all of them train on the same rows, which have two answers
        config = config.replace(objective="orpo")
    config = with_run_name(config)
    run_directory = run_directory_of(config)
    inputs = find_inputs(config, run_directory.parent)
    _refuse_unknown_set(goal, eval_names(config, inputs))
    if config.tune.repeats > 1:
        seed = config.train.seed
        space["seed"] = ray_tune.grid_search(list(range(seed, seed + config.tune.repeats)))
    with claimed(run_directory), working_on(run_directory):
        refuse_another_sweep(run_directory, config, space)
        return _search(config, inputs, space, goal, console)


def _search(
    config: ORPOConfig,
    inputs: RunInputs,
    space: Mapping[str, Any],
    goal: Goal,
    console: Console | None,
) -> SweepResult:
    """`tune` in a run directory that is ours."""
    connection.connect(dashboard=True)
    refuse = partial(refuse_another_sweep, run_directory_of(config), config, space)
    start = start_run(_one_cpu_each(config), inputs, refuse=refuse)
    parts = sweep_parts(start.folder, config, space, start.data_digest)
    start = _with_evaluations(start)
    _log.info(_plan_text(start, space, goal))
    watcher = SweepWatcher(start.run_directory, goal, console)
    waits = connection.reporting_waits(start.config)
    with watcher, waits, stopping_trials(start.folder) as asked_to_stop:
        for part in parts:
            if asked_to_stop.is_set():
                break
            for result in _tuner(start, space, goal, part).fit():
                if result.error is not None:
                    reason = str(result.error).strip().splitlines()[-1]
                    record_failure(start.folder / TRIALS / Path(result.path).name, reason)
        if asked_to_stop.is_set():
            _log_unfinished(start, space, goal)
            raise StoppedError("the sweep is not finished")
    with stopping_on_signals(start.folder / TRIALS / BETA_ZERO):
        return _conclude(start, goal)


def _log_unfinished(start: Start, space: Mapping[str, Any], goal: Goal) -> None:
    """Log how far a sweep came that was stopped."""
    refresh(start.folder)
    trials = [t for t in read_trials(start.run_directory) if t.name != BETA_ZERO]
    cut = [trial.name for trial in trials if trial.status == "unfinished"]
    n_samples = _n_samples(start.config, space)
    _log.info("the trials so far, of which none is chosen yet:")
    for trial in goal.ranked(trials):
        _log.info(trial_text(trial, goal))
    parts = [f"the sweep stopped with {len(trials) - len(cut)} of {n_samples} samples done"]
    if cut:
        parts.append(f"unfinished: {', '.join(cut)}")
    if len(trials) < n_samples:
        n_left = n_samples - len(trials)
        last = f"samples {len(trials) + 1} to {n_samples}" if n_left > 1 else f"sample {n_samples}"
        parts.append(f"not begun: {last}")
    _log.info("; ".join(parts))


def _n_samples(config: ORPOConfig, space: Mapping[str, Any]) -> int:
    """How many trials a whole sweep has: every point of the grids, `num_samples` times."""
    grids = (domain.get("grid_search") for domain in space.values() if isinstance(domain, dict))
    return config.tune.num_samples * math.prod(len(grid) for grid in grids if grid)


def _refuse_unknown_set(goal: Goal, names: list[str]) -> None:
    """Refuse a sweep whose trials would have no evaluation with its metric.

    Raises:
        ConfigError: naming the evaluation sets that there are.
        DataError: when there is none.
    """
    if not names:
        raise DataError(["eval_files: a sweep compares trials on held-out pairs; name files"])
    if goal.prefix not in names:
        name = goal.metric.removeprefix(goal.prefix)
        known = ", ".join(prefix + name for prefix in names)
        raise ConfigError(
            [f"tune.metric: no evaluation set of this sweep has {goal.metric}; known are {known}"]
        )


def _repeat_problems(config: ORPOConfig, space: Mapping[str, Any]) -> list[str]:
    if config.tune.repeats == 1:
        return []
    problems = []
    if config.tune.search_algorithm == "optuna":
        problems.append("tune.repeats: optuna proposes single runs; use search_algorithm=random")
    if "seed" in space:
        problems.append("tune.repeats: the seed is searched as well: keep one of the two")
    return problems


def _one_cpu_each(config: ORPOConfig) -> ORPOConfig:
    """Without GPUs a worker is left one core, so that trials run side by side."""
    if config.ray.resources_per_worker or ray.cluster_resources().get("GPU"):
        return config
    return config.replace(resources_per_worker={"CPU": 1.0})


def _with_evaluations(start: Start) -> Start:
    """Trials are compared at evaluations: without `eval_steps`, eight of them a run."""
    if start.config.train.eval_steps is not None:
        return start
    return replace(start, config=start.config.replace(eval_steps=max(1, start.n_steps // 8)))


def _tuner(start: Start, space: Mapping[str, Any], goal: Goal, part: SweepPart) -> ray_tune.Tuner:
    """A tuner of a part of this sweep, restored from Ray Tune's own state if there is one."""
    # The actor of a trial only waits for its workers. Any share of a CPU would leave one less whole
    # CPU for workers, and Ray refuses to start an actor with no resource at all: it gets a byte.
    trainable = ray_tune.with_resources(trial_function(start), {"memory": 1})
    state = part.state.address
    if ray_tune.Tuner.can_restore(state):
        return ray_tune.Tuner.restore(state, trainable, resume_unfinished=True)
    return ray_tune.Tuner(
        trainable,
        param_space=dict(space),
        tune_config=ray_tune.TuneConfig(
            metric=goal.metric,
            mode=goal.mode,
            num_samples=part.n_samples,
            max_concurrent_trials=concurrent_trials(start.config),
            search_alg=search_algorithm(start.config, part.n_before),
            scheduler=trial_scheduler(start),
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=ray_tune.RunConfig(
            name=part.state.name,
            storage_path=part.state.parent.address,
            verbose=0,
            callbacks=[TrialEnds(start.folder)],
        ),
    )


def _conclude(start: Start, goal: Goal) -> SweepResult:
    """The tables, the best trial's model and config, the report."""
    folder, directory = start.folder, start.run_directory
    refresh(folder)
    trials = goal.ranked([t for t in read_trials(directory) if t.name != BETA_ZERO])
    best = goal.best(trials)
    baseline = _beta_zero(start, best) if best else None
    rows = table_rows(trials, goal)
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
    pa.csv.write_csv(table, str(directory / "results.csv"))
    pq.write_table(table, directory / "results.parquet")
    champion = None
    if best:
        # With the trial's own resources: as many threads, so the very same additions.
        settings = trial_config(start.config, best.values).replace(run_name=None)
        folder.write_text(BEST_CONFIG, to_yaml(settings))
        champion = folder / CHAMPION
        beside = champion.path.with_name(f"{CHAMPION}.tmp")
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree((folder / TRIALS / best.name / FINAL).fetch(), beside)
        champion.remove()
        beside.rename(champion.path)
        champion.publish_all()
    report = write_sweep_report(directory, trials, goal, baseline)
    return SweepResult(
        directory=folder.address,
        best=best,
        trials=trials,
        model_directory=champion.address if champion else None,
        report=f"{folder}/{report.name}",
    )


def _beta_zero(start: Start, best: Trial) -> Trial | None:
    """The best trial's settings without the odds-ratio term, for the figure of the paper."""
    objective = best.values.get("objective", start.config.orpo.objective)
    if not start.config.tune.compare_beta_zero or objective != "orpo":
        return None
    values = dict(best.values) | {"beta": 0.0}
    folder = start.folder / TRIALS / BETA_ZERO
    if folder.read_json(TRIAL_RECORD).get("values", values) != values:
        folder.remove()  # of the best of fewer samples
    if not (folder.path / FINAL).is_dir():
        _log.info("the best trial's settings with beta=0, for comparison")
        run_trial(start, BETA_ZERO, values)
    return next(t for t in read_trials(start.run_directory) if t.name == BETA_ZERO)


def _plan_text(start: Start, space: Mapping[str, Any], goal: Goal) -> str:
    config = start.config.tune
    at_a_time = concurrent_trials(start.config)
    return (
        f"sweep directory: {start.folder}\n"
        f"searching {', '.join(space)}: {config.num_samples} samples, {at_a_time} at a time, "
        f"by {config.search_algorithm} search and {config.trial_scheduler}; "
        f"best {goal.mode} {goal.metric}"
    )


def end_text(result: SweepResult, config: ORPOConfig, command: str) -> str:
    """The end of a sweep on a few lines.

    Args:
        result: of the sweep.
        config: of the sweep.
        command: how the user starts a run, such as `orpo-ray train`.
    """
    goal = Goal.from_config(config)
    lines = [trial_text(trial, goal) for trial in result.trials]
    ruled_out = [trial.name for trial in result.trials if trial.finished and goal.guarded(trial)]
    if ruled_out:
        lines.append(
            f"ruled out, NLL rose by more than max_nll_increase={goal.max_nll_increase}: "
            f"{', '.join(ruled_out)}"
        )
    failed = [trial.name for trial in result.trials if trial.failure]
    if failed:
        lines.append(f"{len(failed)} of {len(result.trials)} trials failed: {', '.join(failed)}")
    if result.best is None:
        lines.append("no finished trial is left to choose")
    else:
        lines += [
            f"best: {trial_text(result.best, goal)}",
            f"champion: {result.model_directory}",
            f"next: {command} {result.directory}/{BEST_CONFIG}",
        ]
    return "\n".join([*lines, f"report: {result.report}"])
