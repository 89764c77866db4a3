"""What a run's page says in words and tables, from the run's files; on the driver."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orpo_ray.config import ORPOConfig
from orpo_ray.orchestration.data_page import budget_lines
from orpo_ray.orchestration.data_report import QUARANTINE, data_lines, source_label
from orpo_ray.orchestration.feed import TRAIN
from orpo_ray.orchestration.progress import figure
from orpo_ray.orchestration.run_curves import Lines, all_prefixes, set_label
from orpo_ray.training.run_files import EVENTS

# Metrics before and after, and their names in the table.
HEADLINE = {
    "rewards/accuracies": "accuracy",
    "log_odds_chosen": "log odds",
    "rewards/margins": "margin",
    "nll_loss": "NLL",
}
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


def headline(evaluations: Lines, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for every evaluation set: its figures before the first step and at the last look."""
    before = evaluations[0] if evaluations and evaluations[0]["step"] == 0 else {}
    after = evaluations[-1] if evaluations and evaluations[-1]["step"] else {}
    return [
        {
            "name": set_label(prefix),
            "pairs": report.get(prefix.rstrip("_"), {}).get("pairs", ""),
            "figures": [
                (_figure(before, prefix + n), _figure(after, prefix + n)) for n in HEADLINE
            ],
        }
        for prefix in all_prefixes(evaluations)
    ]


def _figure(line: Mapping[str, Any], name: str) -> str:
    if name not in line:
        return "-"
    return figure(line[name], ".3f")


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
