"""Evaluating a model: estimates with intervals, by subset and length, beside a second model's.

Workers score the pairs, as in training; the rest is on the driver.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.dataset.ingest import nothing_usable
from orpo_ray.orchestration.inputs import RunInputs, named_model
from orpo_ray.orchestration.preflight import check_model
from orpo_ray.orchestration.score_tables import (
    RESULT,
    codes_of,
    finished_evaluation,
    paired,
    read_finished,
    why_not_comparable,
    with_places,
)
from orpo_ray.orchestration.start import (
    Start,
    ingest_all,
    run_directory_of,
    start_run,
    with_run_name,
)
from orpo_ray.orchestration.workers import PROGRESS, evaluate_worker, run_workers, scores_file
from orpo_ray.preference.errors import DataError
from orpo_ray.pretrained import ModelSource, load_tokenizer
from orpo_ray.reports.evaluation import ScoringWatcher
from orpo_ray.runs.lock import claimed
from orpo_ray.runs.metrics import set_name
from orpo_ray.runs.mirror import working_on
from orpo_ray.runs.statistics import (
    Difference,
    EvaluationResult,
    Scores,
    SetEvaluation,
    differences,
    estimates,
)
from orpo_ray.storage.files import replacing

_log = logging.getLogger(__name__)
_WORKING = ".evaluation"  # of workers and Ray Train, while they run
_LENGTH_GROUPS = 4
_LEAST_PAIRS = 2


def evaluate(
    config: ORPOConfig, inputs: RunInputs | None = None, console: Console | None = None
) -> EvaluationResult:
    """Evaluate a model on the evaluation files, and compare it with `baseline` if there is one.

    A model that is too large for one device is sharded over `num_workers`; `shard_size=1` gives
    every worker a copy. A baseline is evaluated after it, by workers of its own, unless it is a
    finished evaluation.

    Args:
        config: the run.
        inputs: files and model, when they are not those that the config names.
        console: shows progress in place if it is a terminal. Default: it is only logged.

    Raises:
        ConfigError: for settings that the cluster cannot meet, for models that are not supported,
            and while another driver has the run directory.
        DataError: for missing files or models, no evaluation data, and when no row is usable.
        ray.train.TrainingFailedError: when workers keep failing.
    """
    baseline = _baseline(config)
    config = with_run_name(config)
    run_directory = run_directory_of(config)
    with claimed(run_directory), working_on(run_directory):
        start = start_run(config, inputs, only_evals=True)
        if not start.token_sets:
            raise DataError(["eval_files: nothing to evaluate on; name files"])
        return _evaluate_sets(start, baseline, console)


def _evaluate_sets(
    start: Start, baseline: ModelSource | dict[str, pa.Table] | None, console: Console | None
) -> EvaluationResult:
    """`evaluate` on ingested data; the scores of a finished baseline are by shown name."""
    against = _with_baseline(start, baseline) if isinstance(baseline, ModelSource) else None
    scored = _score(start, "", console)
    others: dict[str, pa.Table] = {}
    if against:
        tables = _score(against, "-baseline", console).tables
        others = {_shown(name): table for name, table in tables.items()}
    elif isinstance(baseline, dict):
        ours = {_shown(name): table for name, table in scored.tables.items()}
        others = _comparable(ours, baseline)
    sets = {}
    for name, table in scored.tables.items():
        shown = _shown(name)
        pairing = paired(shown, table, others[shown]) if shown in others else None
        sets[shown] = _statistics(table, pairing, scored.files[name])
    result = EvaluationResult(start.folder.address, sets, scored.metrics)
    start.folder.write_json(RESULT, asdict(result), indent=1)
    return result


def _comparable(
    ours: Mapping[str, pa.Table], finished: Mapping[str, pa.Table]
) -> dict[str, pa.Table]:
    """Those sets of a finished evaluation that ours can be compared with; of others it is said."""
    found = {}
    for name, table in ours.items():
        reason = "it has no such data"
        if name in finished:
            reason = why_not_comparable(table, finished[name]) or ""
        if reason:
            _log.warning("%s data: not compared with the baseline's evaluation: %s", name, reason)
        else:
            found[name] = finished[name]
    return found


def _with_baseline(start: Start, baseline: ModelSource) -> Start:
    """The start with the baseline as its model, and with the pairs in the tokens of its tokenizer.

    Raises:
        ConfigError: for a baseline that cannot be evaluated on them.
        DataError: when its tokenizer can take no pair.
    """
    model = replace(baseline, chat_template=start.inputs.model.chat_template)
    inputs = replace(start.inputs, model=model)
    try:
        token_sets = ingest_all(start.config, inputs, start.folder.parent, only_evals=True)
    except DataError as error:
        lines = [line.replace("model_name_or_path: ", "baseline: ", 1) for line in error.lines]
        raise DataError(lines) from error
    problems = [line for tokens in token_sets.values() for line in nothing_usable(tokens)]
    if problems:
        raise DataError([f"baseline: {line}" for line in problems])
    check_model(start.config, model, token_sets, "baseline")
    if any(token_sets[name].digest != tokens.digest for name, tokens in start.token_sets.items()):
        _log.info(
            "baseline: its tokenizer differs from the model's (%s); its pairs are tokenized with "
            "its own",
            ", ".join(_tokenizer_differences(start.inputs.model, model)),
        )
    return replace(start, inputs=inputs, token_sets=token_sets)


def _tokenizer_differences(one: ModelSource, other: ModelSource) -> list[str]:
    """In what two tokenizers differ."""
    ours, theirs = load_tokenizer(one), load_tokenizer(other)
    parts = {
        "vocabulary": (ours.get_vocab(), theirs.get_vocab()),
        "chat template": (ours.chat_template, theirs.chat_template),
        "first token": (ours.bos_token, theirs.bos_token),
        "end token": (ours.eos_token, theirs.eos_token),
    }
    found = [name for name, (a, b) in parts.items() if a != b]
    return found or ["how texts are split"]


@dataclass(frozen=True)
class _Scored:
    """Every pair of every evaluation set as one model scores it.

    Args:
        metrics: see `EvaluationResult`.
        tables: by the set's name in the feed.
        files: their addresses, by the same names.
    """

    metrics: dict[str, float]
    tables: dict[str, pa.Table]
    files: dict[str, str]


def _score(start: Start, suffix: str, console: Console | None) -> _Scored:
    """Let workers score all sets with the model, and write a file a set."""
    what = suffix.removeprefix("-") or "model"
    folder = start.folder / _WORKING
    folder.remove()
    with ScoringWatcher(folder.path / PROGRESS, what, console):
        answer = run_workers(evaluate_worker, replace(start, folder=folder))
    for text in answer.notices:
        _log.info(text)
    folder.fetch()
    tables, files = {}, {}
    for name, tokens in start.token_sets.items():
        scores = pq.read_table(folder.path / scores_file(name))
        if len(scores) < tokens.n_pairs:
            n_alone = tokens.n_pairs - len(scores)
            text = "%s data: %s rows have one answer, and are in the mean NLL only"
            _log.info(text, _shown(name), n_alone)
        tables[name] = with_places(scores, tokens, start.config)
        part = "" if _shown(name) == "eval" else f"-{_shown(name)}"
        file_name = f"scores{part}{suffix}.parquet"
        files[name] = f"{start.folder}/{file_name}"
        with replacing(start.run_directory / file_name) as path:
            pq.write_table(tables[name], path)
    folder.remove()
    return _Scored(answer.metrics, tables, files)


def _shown(name: str) -> str:
    """What a set of the feed is called in results."""
    return set_name(name) or "eval"


def _statistics(
    table: pa.Table, pairing: tuple[pa.Table, pa.Table] | None, file: str
) -> SetEvaluation:
    """Estimates of one set's scores, and their differences from the baseline's.

    Args:
        table: scores of all pairs.
        pairing: of `paired`; None without a baseline.
        file: of the scores.
    """
    scores = Scores.from_table(table)
    compared: dict[str, Difference] = {}
    if pairing and len(pairing[0]):
        ours, theirs = pairing
        compared = differences(Scores.from_table(ours), Scores.from_table(theirs))
    return SetEvaluation(
        pairs=len(scores.prompts),
        figures=estimates(scores),
        subsets=_by_group(scores, *codes_of(table, "subset")),
        lengths=_by_group(scores, *_length_groups(scores)),
        differences=compared,
        pairs_compared=len(pairing[0]) if pairing else 0,
        scores=file,
    )


def _baseline(config: ORPOConfig) -> ModelSource | dict[str, pa.Table] | None:
    """The second model or the scores of a finished evaluation, if there is one.

    Raises:
        DataError: for a folder that is neither, and for a model that would run code.
    """
    problems: list[str] = []
    name = config.model.baseline
    finished = finished_evaluation(name) if name is not None else None
    if finished is not None:
        return read_finished(finished)
    source = None if name is None else named_model("baseline", name, config, problems)
    if problems:
        raise DataError(problems)
    return source


def _length_groups(scores: Scores) -> tuple[Any, list[str]]:
    """For every pair the range of answer tokens that it falls into, four of about equal number."""
    lengths = scores.chosen_tokens + scores.rejected_tokens
    if not len(lengths):  # no row has two answers
        return np.zeros(0, np.int64), []
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, _LENGTH_GROUPS + 1)))
    places = np.clip(np.searchsorted(edges, lengths, side="right") - 1, 0, max(0, len(edges) - 2))
    width = len(str(int(edges[-1])))
    last = min(1, len(edges) - 1)
    names = [
        f"{int(edges[i]):>{width}} to {int(edges[i + last]):>{width}} tokens"
        for i in range(max(1, len(edges) - 1))
    ]
    return places, names


def _by_group(scores: Scores, codes: Any, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Figures of every group of pairs that has a name.

    Args:
        scores: of all pairs.
        codes: index of the group of each.
        names: of the groups.
    """
    found: dict[str, dict[str, Any]] = {}
    order = np.argsort(codes, kind="stable")
    ends = np.searchsorted(codes[order], np.arange(len(names) + 1))
    for name, code in sorted((name, code) for code, name in enumerate(names) if name):
        members = order[ends[code] : ends[code + 1]]
        if len(members) >= _LEAST_PAIRS:
            found[name] = {"pairs": len(members), "figures": estimates(scores.only(members))}
    return found
