"""The evaluation command: figures with intervals, by subset and length, of one model or two."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.orchestration.inputs import named_model
from orpo_ray.orchestration.scoring import score_token_set
from orpo_ray.orchestration.start import (
    Start,
    make_console,
    run_directory_of,
    start_run,
    with_run_name,
)
from orpo_ray.preference.errors import DataError
from orpo_ray.runs.metrics import set_name
from orpo_ray.runs.mirror import working_on
from orpo_ray.runs.statistics import Difference, Estimate, Scores, differences, estimates
from orpo_ray.storage.bucket import address
from orpo_ray.storage.files import write_json

RESULT = "evaluation.json"
_SHOWN = ("accuracy", "length_controlled_accuracy", "margin", "log_odds", "perplexity")
_LENGTH_GROUPS = 4
_LEAST_PAIRS = 2


@dataclass(frozen=True)
class SetEvaluation:
    """What one model makes of one evaluation set.

    Args:
        pairs: how many.
        figures: by name, see `orpo_ray.runs.statistics.FIGURES`.
        subsets: the same for the pairs of each value of `eval_subset_column`.
        lengths: the same for four groups of pairs of about the same length, the shortest first.
        differences: from the baseline, if there is one.
        scores: the file with a row a pair.
    """

    pairs: int
    figures: dict[str, Estimate]
    subsets: dict[str, dict[str, Any]]
    lengths: dict[str, dict[str, Any]]
    differences: dict[str, Difference]
    scores: str


@dataclass(frozen=True)
class EvaluationResult:
    """A finished evaluation.

    Args:
        run_directory: absolute path or URL; `evaluation.json` in it holds the same.
        sets: by name of the evaluation set; `eval` where it has none.
    """

    run_directory: str
    sets: dict[str, SetEvaluation]


def evaluate_model(config: ORPOConfig) -> EvaluationResult:
    """Score the evaluation files with a model, and with `baseline` where one is named.

    Raises:
        ConfigError: for settings that the cluster cannot meet.
        DataError: for missing files or models, no evaluation data, and when no row is usable.
    """
    console = make_console()
    baseline = _baseline(config)
    config = with_run_name(config)
    with working_on(run_directory_of(config)):
        return _evaluate_sets(config, baseline, console)


def _evaluate_sets(config: ORPOConfig, baseline: str | None, console: Console) -> EvaluationResult:
    """`evaluate_model` in a run directory that is kept in step."""
    start = start_run(config, console, only_evals=True)
    if not start.token_sets:
        raise DataError(["eval_files: nothing to evaluate on; name files"])
    sets = {}
    for name in start.token_sets:
        shown = set_name(name) or "eval"
        sets[shown] = _evaluate_set(start, name, shown, console, baseline)
        for table in _tables(shown, sets[shown]):
            console.print(table)
    result = EvaluationResult(address(start.run_directory), sets)
    path = start.run_directory / RESULT
    write_json(path, asdict(result), indent=1)
    console.print(f"evaluation: {address(path)}", markup=False)
    for part in sets.values():
        console.print(f"a row a pair: {part.scores}", markup=False)
    return result


def _evaluate_set(
    start: Start, name: str, shown: str, console: Console, baseline: str | None
) -> SetEvaluation:
    config, tokens = start.config, start.token_sets[name]
    suffix = "" if shown == "eval" else f"-{shown}"
    path = start.run_directory / f"scores{suffix}.parquet"
    table, problem = score_token_set(config, start.inputs.model.model, tokens, path)
    scores = Scores.of(table)
    found: dict[str, Difference] = {}
    if problem:
        console.print(f"warning: the model computes padded rows: {problem}", markup=False)
    if baseline is not None:
        other_path = start.run_directory / f"scores{suffix}-baseline.parquet"
        other, _ = score_token_set(config, baseline, tokens, other_path)
        found = differences(scores, Scores.of(other))
    return SetEvaluation(
        pairs=len(scores.prompts),
        figures=estimates(scores),
        subsets=_by_group(scores, np.array(table["subset"].to_pylist())),
        lengths=_by_group(scores, _length_groups(scores)),
        differences=found,
        scores=address(path),
    )


def _baseline(config: ORPOConfig) -> str | None:
    """The second model, if there is one.

    Raises:
        DataError: for a folder that is none, and for a model that would run code.
    """
    problems: list[str] = []
    name = config.model.baseline
    source = None if name is None else named_model("baseline", name, config, problems)
    if problems:
        raise DataError(problems)
    return source.model if source else None


def _length_groups(scores: Scores) -> Any:
    """For every pair the range of answer tokens that it falls into, four of about equal number."""
    lengths = scores.chosen_tokens + scores.rejected_tokens
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, _LENGTH_GROUPS + 1)))
    places = np.clip(np.searchsorted(edges, lengths, side="right") - 1, 0, max(0, len(edges) - 2))
    width = len(str(int(edges[-1])))
    last = min(1, len(edges) - 1)
    names = [
        f"{int(edges[i]):>{width}} to {int(edges[i + last]):>{width}} tokens"
        for i in range(max(1, len(edges) - 1))
    ]
    return np.array(names)[places]


def _by_group(scores: Scores, groups: Any) -> dict[str, dict[str, Any]]:
    """Figures of every group of pairs that has a name."""
    found: dict[str, dict[str, Any]] = {}
    for group in sorted(set(groups.tolist()) - {""}):
        part = scores.only(groups == group)
        if len(part.prompts) >= _LEAST_PAIRS:
            found[group] = {"pairs": len(part.prompts), "figures": estimates(part)}
    return found


def _tables(name: str, part: SetEvaluation) -> list[Table]:
    """The figures as tables of a terminal."""
    heads = (figure.replace("length_controlled", "length-controlled") for figure in _SHOWN)
    table = Table(
        "95 % intervals",
        *(h.replace("_", " ") for h in heads),
        title=f"{name} data",
        box=box.SIMPLE,
    )
    table.add_row(f"all {part.pairs} pairs", *_cells(part.figures))
    for groups in (part.subsets, part.lengths):
        table.add_section()
        for group, values in groups.items():
            table.add_row(f"{group} ({values['pairs']})", *_cells(values["figures"]))
    if not part.differences:
        return [table]
    against = Table(
        "model less baseline", "difference", "95 % interval", "p", title="paired", box=box.SIMPLE
    )
    for figure, found in part.differences.items():
        interval = f"{found.low:+.4f} to {found.high:+.4f}"
        against.add_row(figure, f"{found.value:+.4f}", interval, f"{found.p_value:.3f}")
    return [table, against]


def _cells(figures: Mapping[str, Estimate]) -> list[str]:
    def cell(estimate: Estimate) -> str:
        if np.isnan(estimate.value):
            return "-"
        return f"{estimate.value:.4g} ({estimate.low:.4g} to {estimate.high:.4g})"

    return [cell(figures[name]) for name in _SHOWN]
