"""`report.html` and `curves.png`: the page of a run, from its files alone; on the driver."""

import shlex
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orpo_ray.config.file import to_yaml
from orpo_ray.config.schema import ORPOConfig
from orpo_ray.dataset.request import TRAIN
from orpo_ray.reports.curves import (
    CURVES,
    LEARNING,
    THROUGHPUT,
    Lines,
    chart_svgs,
    set_label,
    write_picture,
)
from orpo_ray.reports.data import QUARANTINE, data_lines, source_label
from orpo_ray.reports.data_page import budget_lines
from orpo_ray.reports.outcome import estimate_text
from orpo_ray.reports.page import render
from orpo_ray.runs.evaluations import Evaluation, latest, read_evaluations
from orpo_ray.runs.files import (
    CONFIG,
    FINAL,
    SAMPLES,
    TIME_PARTS,
    TIME_PREFIX,
    count_events,
    exported_step,
    read_events,
    read_metrics,
)
from orpo_ray.runs.formatting import format_duration, format_time
from orpo_ray.runs.metrics import HEADLINE, Metric
from orpo_ray.runs.status import total_steps
from orpo_ray.runs.suspects import first_suspects, too_early_to_tell
from orpo_ray.storage.files import read_lines, write_atomic
from orpo_ray.storage.folder import Folder, FolderLike
from orpo_ray.version import __version__

REPORT = "report.html"
_SHOWN_FILES, _SHOWN_GAPS, _SHOWN_EVENTS, _SHOWN_SUSPECTS = 20, 20, 200, 10
_PACKAGES = ("torch", "ray", "transformers")
_FILE_COLUMNS = (
    "rows_read",
    "rows_kept",
    "rows_trained",
    "rows_not_reached",
    "rows_held_out",
    "rows_refused",
    "truncated_pairs",
)


def write_run_report(place: FolderLike, config: ORPOConfig, data_report: Mapping[str, Any]) -> Path:
    """Write `report.html` and `curves.png` of a run, under way or at its end.

    Args:
        place: the run directory, with what the run has written so far.
        config: of the run, resolved.
        data_report: the content of `data_report.json`.

    Returns:
        The path of `report.html`.
    """
    folder = Folder.at(place)
    run_directory = folder.path
    lines = read_metrics(run_directory)
    exported = exported_step(run_directory / FINAL)  # not the last where the best model is loaded
    evaluations = read_evaluations(run_directory, lines, exported)
    events = [
        ("torn" if time is None else format_time(time), text)
        for time, text in read_events(run_directory)
    ]
    counts = sorted(count_events(run_directory).items())
    suspects = first_suspects(run_directory, _SHOWN_SUSPECTS)
    again = (f"{folder}/{CONFIG}", f"run_name={run_directory.name}-again")
    page = render(
        "run.html.j2",
        title=run_directory.name,
        facts=facts(config, data_report, lines),
        names=[metric.label for metric in HEADLINE],
        headline=headline(evaluations, data_report),
        steps=evaluations[-1].step if evaluations else 0,
        learning=chart_svgs(LEARNING, lines),
        throughput=chart_svgs(THROUGHPUT, lines),
        spent=_time_spent(lines),
        samples=_samples(run_directory, exported),
        suspects=suspects,
        too_early=suspects and too_early_to_tell(run_directory),
        gaps=_gaps(lines),
        parts=[_data_part(name, counts) for name, counts in data_report.items()],
        counts=", ".join(f"{kind.replace('_', ' ')}: {count}" for kind, count in counts),
        events=events[-_SHOWN_EVENTS:],
        n_events=len(events),
        command=shlex.join(("python", "jobs/train.py", *again)),
        versions=[("orpo_ray", __version__), *((name, version(name)) for name in _PACKAGES)],
        settings=to_yaml(config),
    )
    write_picture(run_directory / CURVES, lines)
    path = run_directory / REPORT
    write_atomic(path, page)
    return path


def facts(config: ORPOConfig, report: Mapping[str, Any], lines: Lines) -> list[tuple[str, str]]:
    """Model, data, method and progress of a run, each with its name."""
    model, train = config.model, config.train
    base = model.model_name_or_path or "the demo's decoder, from scratch"
    if model.model_revision:
        base += f" at {model.model_revision}"
    if model.lora_r is not None:
        base += f", LoRA adapters of rank {model.lora_r}"
    rows = [("model", base)]
    for name, counts in report.items():
        what = "training data" if name == TRAIN else f"{name.replace('eval', 'evaluation', 1)} data"
        files = list(counts.get("sources", ()))
        shown = ", ".join(files[:_SHOWN_FILES]) or "held out of the training files"
        n_more = _n_files(counts) - _SHOWN_FILES
        more = f" and {n_more} more" if n_more > 0 else ""
        rows.append((what, f"{counts['pairs']} pairs: {shown}{more}"))
    method = f"{config.orpo.text}, learning rate {train.learning_rate:g}"
    pairs = f"{config.pairs_per_step} pairs per step"
    rows.append(("method", f"{method} ({train.lr_scheduler_type}), {pairs}"))
    rows.append(("steps", _progress_text(config, lines)))
    if lines:
        first, last = lines[0]["time"], lines[-1]["time"]
        span = f"{format_time(first)} to {format_time(last)}"
        rows.append(("logged", f"{span}, {format_duration(last - first)}"))
    return rows


def _progress_text(config: ORPOConfig, lines: Lines) -> str:
    n_steps = total_steps(config, lines)
    if not lines or not lines[-1]["step"] or n_steps is None:
        return "none yet"
    step, epoch = lines[-1]["step"], lines[-1]["epoch"]
    return f"{step} of {n_steps}, {epoch:.3g} epochs" + (" so far" if step < n_steps else "")


def headline(evaluations: list[Evaluation], report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per evaluation set: its metrics before the first step and at the last evaluation.

    Args:
        evaluations: of the run, up to the exported model.
        report: the content of `data_report.json`.
    """
    before = latest([evaluation for evaluation in evaluations if evaluation.step == 0])
    after = latest([evaluation for evaluation in evaluations if evaluation.step])
    return [
        {
            "name": set_label(prefix),
            "pairs": report.get(prefix.rstrip("_"), {}).get("pairs", ""),
            "metrics": [
                (_estimate_text(before.get(prefix), m), _estimate_text(after.get(prefix), m))
                for m in HEADLINE
            ],
        }
        for prefix in latest(evaluations)
    ]


def _estimate_text(evaluation: Evaluation | None, metric: Metric) -> str:
    if evaluation is None or evaluation.prefix + metric.name not in evaluation.line:
        return "-"
    return estimate_text(evaluation, metric, ".3f")


def _time_spent(lines: Lines) -> list[tuple[str, str, str]]:
    """Part, seconds, and share of the time from the first line of the metrics to the last.

    The rest is what lies between: restarts of workers, logging, and the like.
    """
    if not lines:
        return []
    spent = {part: sum(line.get(TIME_PREFIX + part, 0.0) for line in lines) for part in TIME_PARTS}
    # The first line is written at the end of what it counts.
    first = sum(lines[0].get(TIME_PREFIX + part, 0.0) for part in TIME_PARTS)
    whole = max(lines[-1]["time"] - lines[0]["time"] + first, sum(spent.values()), 1e-9)
    spent["the rest"] = whole - sum(spent.values())
    return [
        (part.replace("_", " "), f"{seconds:.1f}", f"{seconds / whole:.1%}")
        for part, seconds in spent.items()
    ]


def _samples(run_directory: Path, last_step: int | None) -> list[dict[str, Any]]:
    """The first and the last answer to each prompt; no later one than of `last_step`."""
    answers: dict[str, list[dict[str, Any]]] = {}
    for line in read_lines(run_directory / SAMPLES):
        if last_step is None or line["step"] <= last_step:
            answers.setdefault(line["prompt"], []).append(line)
    return [
        {
            "prompt": prompt,
            "chosen": samples[0]["chosen"],
            "before": samples[0]["answer"] if samples[0]["step"] == 0 else None,
            "after": samples[-1]["answer"] if samples[-1]["step"] else None,
        }
        for prompt, samples in answers.items()
    ]


def _gaps(lines: Lines) -> str:
    """The metrics that were not finite, and at which steps."""
    found: dict[str, list[str]] = {}
    for line in lines:
        for name in (name for name, value in line.items() if value is None):
            found.setdefault(name, []).append(str(line["step"]))
    texts = []
    for name, steps in found.items():
        more = ", ..." if len(steps) > _SHOWN_GAPS else ""
        texts.append(f"{name} at step {', '.join(steps[:_SHOWN_GAPS])}{more}")
    return "; ".join(texts)


def _n_files(counts: Mapping[str, Any]) -> int:
    """The source files of a data set, whose counts are in `sources` only for the first ones."""
    return len(counts.get("sources", ())) + int(counts.get("more_sources", {}).get("files", 0))


def _data_part(name: str, counts: Mapping[str, Any]) -> dict[str, Any]:
    """The section of one data set."""
    lines = [line.removeprefix(f"{name} data: ") for line in data_lines(name, counts)]
    columns = [column for column in _FILE_COLUMNS if column in counts]
    sources = counts.get("sources", {})
    rows = [
        [source_label(path, part), *(part[c] for c in columns)]
        for path, part in list(sources.items())[:_SHOWN_FILES]
    ]
    return {
        "name": name,
        "lines": [*lines, *budget_lines(counts)],
        "columns": [c.removeprefix("rows_").replace("_", " ") for c in columns],
        "rows": rows,
        "n_more": _n_files(counts) - len(rows),
        "refused": sorted(counts.get("refused", {}).items(), key=lambda item: -item[1]),
        "listed": f"{QUARANTINE}/{name}.jsonl",
    }
