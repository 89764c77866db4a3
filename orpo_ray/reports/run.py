"""`report.html` and `curves.png`: a run to look at, from its files alone; on the driver."""

import json
import shlex
from collections.abc import Mapping
from datetime import UTC, datetime
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
    all_prefixes,
    chart_svgs,
    set_label,
    write_picture,
)
from orpo_ray.reports.data import QUARANTINE, data_lines, source_label
from orpo_ray.reports.data_page import budget_lines
from orpo_ray.reports.page import render
from orpo_ray.runs.files import (
    CONFIG,
    EVALUATIONS,
    EVENTS,
    FINAL,
    SAMPLES,
    TIME_PARTS,
    TIME_PREFIX,
    count_events,
    exported_step,
    read_metrics,
)
from orpo_ray.runs.metrics import figure
from orpo_ray.runs.suspects import first_suspects
from orpo_ray.storage.bucket import address
from orpo_ray.storage.files import read_lines, write_atomic
from orpo_ray.version import __version__

# Metrics before and after, and their names in the table.
HEADLINE = {
    "rewards/accuracies": "accuracy",
    "log_odds_chosen": "log odds",
    "rewards/margins": "margin",
    "nll_loss": "NLL",
}
# Figures of `evaluations.jsonl` that have the same meaning as a metric, and so its interval.
_WITH_INTERVAL = {"rewards/accuracies": "accuracy", "log_odds_chosen": "log_odds"}
_SHOWN_FILES, _SHOWN_GAPS = 20, 20
_FILE_COLUMNS = (
    "rows_read",
    "rows_kept",
    "rows_trained",
    "rows_not_reached",
    "rows_held_out",
    "rows_refused",
    "truncated_pairs",
)


def facts(config: ORPOConfig, report: Mapping[str, Any], lines: Lines) -> list[tuple[str, str]]:
    """What was trained, on what, and how far it is."""
    model, train = config.model, config.train
    base = model.model_name_or_path or "the demo's decoder, from scratch"
    if model.model_revision:
        base += f" at {model.model_revision}"
    if model.lora_r is not None:
        base += f", LoRA adapters of rank {model.lora_r}"
    told = [("model", base)]
    for name, figures in report.items():
        what = "training data" if name == TRAIN else f"{name.replace('eval', 'evaluation', 1)} data"
        files = list(figures.get("sources", ()))
        shown = ", ".join(files[:_SHOWN_FILES]) or "held out of the training files"
        more = f" and {len(files) - _SHOWN_FILES} more" if len(files) > _SHOWN_FILES else ""
        told.append((what, f"{figures['pairs']} pairs: {shown}{more}"))
    method = f"beta {config.orpo.beta:g}, learning rate {train.learning_rate:g}"
    pairs = f"{config.pairs_per_step} pairs a step"
    told.append(("method", f"{method} ({train.lr_scheduler_type}), {pairs}"))
    told.append(("steps", _progress_text(config, lines)))
    if lines:
        first, last = lines[0]["time"], lines[-1]["time"]
        seconds = round(last - first)
        clock = f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
        told.append(("logged", f"{_clock(first)} to {_clock(last)}, {clock} hours"))
    return told


def _progress_text(config: ORPOConfig, lines: Lines) -> str:
    """Steps done, and of how many as far as the metrics tell."""
    if not lines or not lines[-1]["step"]:
        return "none yet"
    step, epoch = lines[-1]["step"], lines[-1]["epoch"]
    n_steps = config.total_steps(round(step / epoch))
    return f"{step} of {n_steps}, {epoch:.3g} epochs" + (" so far" if step < n_steps else "")


def evaluations_until(lines: Lines, step: int | None) -> list[Mapping[str, Any]]:
    """The lines of the metrics that have evaluations, to that of a step, or all for None."""
    evaluations = [line for line in lines if all_prefixes([line])]
    return [line for line in evaluations if step is None or line["step"] <= step]


def headline(
    run_directory: Path, evaluations: Lines, report: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """A row for every evaluation set: its figures before the first step and at the last look.

    Args:
        run_directory: of the run.
        evaluations: the lines of its metrics that have some, up to the model that counts.
        report: what `data_report.json` holds.
    """
    intervals = {
        (line["step"], line["set"]): line["figures"]
        for line in read_lines(run_directory / EVALUATIONS)
    }
    before = evaluations[0] if evaluations and evaluations[0]["step"] == 0 else {}
    after = evaluations[-1] if evaluations and evaluations[-1]["step"] else {}

    def shown(line: Mapping[str, Any], prefix: str, name: str) -> str:
        if prefix + name not in line:
            return "-"
        known = intervals.get((line["step"], prefix), {})
        value, low, high = known.get(_WITH_INTERVAL.get(name), (None, None, None))
        text = figure(line[prefix + name], ".3f")
        return text if low is None or value is None else f"{text} ({low:.3f} to {high:.3f})"

    return [
        {
            "name": set_label(prefix),
            "pairs": report.get(prefix.rstrip("_"), {}).get("pairs", ""),
            "figures": [(shown(before, prefix, n), shown(after, prefix, n)) for n in HEADLINE],
        }
        for prefix in all_prefixes(evaluations)
    ]


def time_spent(lines: Lines) -> list[tuple[str, str, str]]:
    """Where a run's time went: part, seconds, share of the time from its first line to its last.

    What is left over is the start of workers again after a fault, logging, and the like.
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


def samples_of(run_directory: Path, last_step: int | None) -> list[dict[str, Any]]:
    """What the model said to each prompt at first and at last.

    Args:
        run_directory: of the run.
        last_step: that of the model that counts; None for the last one that there is.
    """
    answers: dict[str, list[dict[str, Any]]] = {}
    for line in read_lines(run_directory / SAMPLES):
        if last_step is None or line["step"] <= last_step:
            answers.setdefault(line["prompt"], []).append(line)
    return [
        {
            "prompt": prompt,
            "chosen": told[0]["chosen"],
            "before": told[0]["answer"] if told[0]["step"] == 0 else None,
            "after": told[-1]["answer"] if told[-1]["step"] else None,
        }
        for prompt, told in answers.items()
    ]


def gaps(lines: Lines) -> str:
    """Which metrics were not finite, and at which steps."""
    found: dict[str, list[str]] = {}
    for line in lines:
        for name in (name for name, value in line.items() if value is None):
            found.setdefault(name, []).append(str(line["step"]))
    texts = []
    for name, steps in found.items():
        more = ", ..." if len(steps) > _SHOWN_GAPS else ""
        texts.append(f"{name} at step {', '.join(steps[:_SHOWN_GAPS])}{more}")
    return "; ".join(texts)


def data_part(name: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of one data set."""
    told = [line.removeprefix(f"{name} data: ") for line in data_lines(name, figures)]
    columns = [column for column in _FILE_COLUMNS if column in figures]
    sources = figures.get("sources", {})
    rows = [
        [source_label(path, part), *(part[c] for c in columns)]
        for path, part in list(sources.items())[:_SHOWN_FILES]
    ]
    return {
        "name": name,
        "lines": [*told, *budget_lines(figures)],
        "columns": [c.removeprefix("rows_").replace("_", " ") for c in columns],
        "rows": rows,
        "n_more": len(sources) - len(rows),
        "refused": sorted(figures.get("refused", {}).items(), key=lambda item: -item[1]),
        "listed": f"{QUARANTINE}/{name}.jsonl",
    }


def events_of(run_directory: Path) -> list[tuple[str, str]]:
    """When and what; a line that was torn is shown as it is, the one being written left out."""
    path = run_directory / EVENTS
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    events = []
    for line in whole.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            events.append(("torn", line))
        else:
            events.append((_clock(event["time"]), event["text"]))
    return events


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


REPORT = "report.html"
_SHOWN_EVENTS, _SHOWN_SUSPECTS = 200, 10
_PACKAGES = ("torch", "ray", "transformers")


def write_run_report(
    run_directory: Path, config: ORPOConfig, data_report: Mapping[str, Any]
) -> Path:
    """Write `report.html` and `curves.png` of a run, under way or at its end.

    Args:
        run_directory: with what the run has written so far.
        config: of the run, resolved.
        data_report: what `data_report.json` holds.

    Returns:
        The path of `report.html`.
    """
    lines = read_metrics(run_directory)
    ended = exported_step(run_directory / FINAL)  # an earlier one where the best model is loaded
    shown = evaluations_until(lines, ended)
    events = events_of(run_directory)
    met = sorted(count_events(run_directory).items())
    again = (address(run_directory / CONFIG), f"run_name={run_directory.name}-again")
    page = render(
        "run.html.j2",
        title=run_directory.name,
        facts=facts(config, data_report, lines),
        names=HEADLINE.values(),
        headline=headline(run_directory, shown, data_report),
        steps=shown[-1]["step"] if shown else 0,
        learning=chart_svgs(LEARNING, lines),
        throughput=chart_svgs(THROUGHPUT, lines),
        spent=time_spent(lines),
        samples=samples_of(run_directory, ended),
        suspects=first_suspects(run_directory, _SHOWN_SUSPECTS),
        gaps=gaps(lines),
        parts=[data_part(name, figures) for name, figures in data_report.items()],
        counts=", ".join(f"{kind.replace('_', ' ')}: {count}" for kind, count in met),
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
