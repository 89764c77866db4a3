"""Training and preparing: from a config to a trained model or to token shards; on the driver."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from ray.train import Checkpoint, UserCallback
from rich.console import Console

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.dataset.request import TRAIN
from orpo_ray.orchestration.inputs import RunInputs
from orpo_ray.orchestration.start import Start, run_directory_of, start_run, with_run_name
from orpo_ray.orchestration.stopping import requests
from orpo_ray.orchestration.trackers import Trackers, refuse_missing
from orpo_ray.orchestration.workers import ComputeMetrics, run_workers, train_worker
from orpo_ray.reports.card import write_model_card
from orpo_ray.reports.curves import picture
from orpo_ray.reports.data import count_trained, save_report
from orpo_ray.reports.data_page import budget_lines, write_data_page
from orpo_ray.reports.live import RunWatcher, try_report
from orpo_ray.reports.outcome import label_noise_line, outcome_lines
from orpo_ray.reports.run import REPORT, write_run_report
from orpo_ray.runs.files import (
    CONFIG,
    DATA_REPORT,
    FINAL,
    LEDGER,
    STOP,
    count_events,
    read_metrics,
    summary,
)
from orpo_ray.runs.formatting import format_rows
from orpo_ray.runs.lock import claimed
from orpo_ray.runs.mirror import working_on
from orpo_ray.runs.suspects import write_suspects
from orpo_ray.storage.bucket import stamp
from orpo_ray.storage.folder import Folder

_log = logging.getLogger(__name__)


@contextmanager
def stopping_on_signals(run: Folder) -> Iterator[None]:
    """Let a signal (Ctrl-C, `ray job stop`, a pod that ends) ask workers to save and to stop.

    While they have made no step, or outside the main thread, nothing is asked.

    Args:
        run: where the workers look for the request.
    """
    run.remove(STOP)
    ledger, request = run.path / LEDGER, run.path / STOP
    before = stamp(ledger) if ledger.exists() else None

    def ask() -> bool:
        try:
            if stamp(ledger) == before:
                return False
            request.touch()
        except OSError:  # there is no ledger yet, or no room for a request
            return False
        return True

    try:
        with requests(ask):
            yield
    finally:
        run.remove(STOP)


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Args:
        run_directory: absolute path or URL; `docs/runs.md` lists its files.
        model_directory: the trained model, for `AutoModelForCausalLM.from_pretrained`.
        metrics: last logged training metrics and last evaluation.
        metrics_before: the evaluation before the first step; empty without evaluation data.
        data_report: rows read, trained, refused and held out, by data set and file.
        events: what the run met on its way (`resumed`, `steps_redone`, `rows_skipped`, ...).
    """

    run_directory: str
    model_directory: str
    metrics: dict[str, float]
    metrics_before: dict[str, float] = field(default_factory=dict)
    data_report: dict[str, Any] = field(default_factory=dict)
    events: dict[str, int] = field(default_factory=dict)

    def plot(self) -> Any:
        """The curves of `report.html` as a matplotlib figure, which a notebook shows."""
        return picture(self._lines)

    @property
    def path(self) -> str:
        """The run directory, by its name in `ray.train.Result`."""
        return self.run_directory

    @property
    def checkpoint(self) -> Checkpoint:
        """The trained model as a checkpoint of Ray Train."""
        return Checkpoint(self.model_directory)

    @property
    def metrics_dataframe(self) -> Any:
        """All lines of `metrics.jsonl` as a pandas frame."""
        import pandas

        return pandas.DataFrame(self._lines)

    @property
    def global_step(self) -> int:
        """Optimizer steps done."""
        return int(self._lines[-1]["step"])

    @property
    def training_loss(self) -> float:
        """The mean loss of all steps."""
        return mean_loss(self._lines)

    @property
    def _lines(self) -> list[dict[str, Any]]:
        return read_metrics(Folder.at(self.run_directory).path)


class Follower(Protocol):
    """What is told of a run while it trains, in a thread."""

    def begin(self, n_steps: int, steps_per_epoch: int) -> None:
        """Called before workers start."""

    def log(self, line: Mapping[str, Any]) -> None:
        """Called with every line of the metrics, also those of an earlier attempt."""


def mean_loss(lines: Sequence[Mapping[str, Any]]) -> float:
    """The mean of the logged losses, each weighted by the steps that it is of."""
    total, before = 0.0, 0
    for line in lines:
        if line.get("loss") is not None:
            total += line["loss"] * (line["step"] - before)
            before = line["step"]
    return total / before if before else math.nan


def train(
    config: ORPOConfig,
    inputs: RunInputs | None = None,
    console: Console | None = None,
    follower: Follower | None = None,
    compute_metrics: ComputeMetrics | None = None,
) -> TrainResult:
    """Run ORPO as the config says, on the cluster at hand or on this machine.

    An existing run directory resumes from its newest checkpoint.

    Args:
        config: the run.
        inputs: files and model, when they are not those that the config names.
        console: shows progress as a live view if it is a terminal. Default: progress is only
            logged, by the logger `orpo_ray`.
        follower: told of every line that is logged.
        compute_metrics: further metrics of an evaluation, of tables of scores by the prefix of
            their set; called on a worker.

    Raises:
        ConfigError: for settings that the cluster or the run directory cannot meet, and while
            another driver has the run directory.
        DataError: for missing files and when no usable row is left.
        TrainingError: for a loss that is not finite.
        ray.train.TrainingFailedError: when workers keep failing.
        StoppedError: when this process got SIGTERM or SIGHUP, once a checkpoint was saved.
        KeyboardInterrupt: on Ctrl-C; also once a checkpoint was saved, but for a second one.
    """
    config = with_run_name(config)
    run_directory = run_directory_of(config)
    refuse_missing(config.output.report_to)
    with claimed(run_directory), working_on(run_directory):
        start = start_run(config, inputs)
        resources = start.config.ray.resources_per_worker
        _log.info("run directory: %s", run_directory)
        _log.info("starting %s worker(s) with %s", _workers_text(start.config), resources)
        with stopping_on_signals(run_directory):
            return train_run(start, console, (), follower, compute_metrics)


def train_run(
    start: Start,
    console: Console | None = None,
    callbacks: Sequence[UserCallback] = (),
    follower: Follower | None = None,
    compute_metrics: ComputeMetrics | None = None,
) -> TrainResult:
    """Train on ingested data in a run directory that is ours, and write its reports.

    Args:
        start: from `start_run`.
        console: see `train`.
        callbacks: of Ray Train, called at every report.
        follower: see `train`.
        compute_metrics: see `train`.

    Raises:
        StoppedError: when the run was asked to stop, once a checkpoint was saved.
        Others: see `train`.
    """
    config, run_directory, data_report = start.config, start.run_directory, start.data_report
    tokens = start.token_sets[TRAIN]
    refresh = partial(write_run_report, start.folder, config, data_report)
    with closing(Trackers(config, run_directory)) as trackers:

        def log(line: Mapping[str, Any]) -> None:
            trackers.log(line)
            if follower is not None:
                follower.log(line)

        if follower is not None:
            follower.begin(start.n_steps, start.steps_per_epoch)
        with RunWatcher(run_directory, start.n_steps, console, refresh, log):
            work = partial(train_worker, compute_metrics=compute_metrics)
            run_workers(work, start, callbacks)
        data_report = count_trained(run_directory, data_report, tokens)
        save_report(run_directory, data_report)
        write_suspects(run_directory, tokens.sources)
        try_report(partial(write_run_report, start.folder, config, data_report))
        card = write_model_card(start.folder, config, data_report)
        texts = (run_directory / CONFIG, run_directory / DATA_REPORT, card)
        trackers.log_texts({path.name: path.read_text(encoding="utf-8") for path in texts})
    figures = summary(run_directory)
    return TrainResult(
        run_directory=start.folder.address,
        model_directory=(start.folder / FINAL).address,
        metrics=figures["after"] | figures["train"],
        metrics_before=figures["before"],
        data_report=data_report,
        events=count_events(run_directory),
    )


def prepare(config: ORPOConfig) -> dict[str, Any]:
    """Ingest only: token shards into the cache, reports into the run directory.

    Returns:
        What `data_report.json` holds.

    Raises:
        ConfigError: while another driver has the run directory.
        DataError: for missing files and when no usable row is left.
    """
    config = with_run_name(config)
    run_directory = run_directory_of(config)
    with claimed(run_directory), working_on(run_directory):
        start = start_run(config, trains=False)
        for name, figures in start.data_report.items():
            for line in budget_lines(figures):
                _log.info("%s %s", name, line)
        page = write_data_page(start.run_directory, start.data_report, start.token_sets)
    shown = f"{start.folder}/{page.name} and {start.folder}/{DATA_REPORT}"
    _log.info("data report: %s", shown)
    return start.data_report


def _workers_text(config: ORPOConfig) -> str:
    ray = config.ray
    if ray.min_workers == ray.max_workers:
        return str(ray.max_workers)
    return f"{ray.min_workers} to {ray.max_workers}"


def end_text(result: TrainResult, config: ORPOConfig, command: str) -> str:
    """The end of a run on a few lines: what came of it, where it is, what to try next.

    Args:
        result: of the run.
        config: of the run, as the user gave it.
        command: how the user starts a run, such as `orpo-ray train`.
    """
    directory = Folder.at(result.run_directory).path
    lines = outcome_lines(directory)
    lines.append(f"{TRAIN} data: {format_rows(result.data_report[TRAIN])}")
    if result.events:
        met = ", ".join(f"{kind} {count}" for kind, count in sorted(result.events.items()))
        lines.append(f"events: {met} (events.jsonl)")
    lines += [
        f"run directory: {result.run_directory} ({REPORT} in it)",
        label_noise_line(directory),
        f"model: {result.model_directory}",
    ]
    if config.data.train_files is None and config.orpo.objective == "orpo":
        lines.append(
            f"next: {command} beta=0 run_name=without-odds-ratio   "
            "(the same without the odds-ratio term)"
        )
    else:
        lines.append(
            f"next: {command} ... run_name={Folder.at(result.run_directory).name} with a higher "
            "max_steps or num_train_epochs resumes from here"
        )
    return "\n".join(lines)
