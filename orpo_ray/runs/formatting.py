"""How numbers, durations, times, settings and row counts are written for people."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any


def format_metric(value: float | None, form: str = ".4f") -> str:
    """The value of a metric: None is one that was not finite, NaN one that does not exist."""
    if value is None:
        return "not finite"
    return "-" if math.isnan(value) else format(value, form)


def format_settings(values: Mapping[str, Any]) -> str:
    """Settings on one line, `beta=0.1, learning_rate=8e-06`."""
    return ", ".join(f"{name}={format_setting(value)}" for name, value in values.items())


def format_setting(value: Any) -> str:
    """The value of a setting."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_duration(seconds: float) -> str:
    """A duration in its two largest units that matter."""
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if minutes < 1:
        return f"{int(seconds)} s"
    if hours < 1:
        return f"{minutes} min {int(seconds) % 60} s"
    if hours < 48:
        return f"{hours} h {minutes % 60} min"
    return f"{hours // 24} days"


def format_time(seconds: float) -> str:
    """A point in time, given in seconds since 1970."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def format_rows(counts: Mapping[str, Any]) -> str:
    """What became of the rows of a data set: those read are the sum of the others.

    Args:
        counts: of the data set in `data_report.json`.
    """
    if "rows_read" not in counts:
        return f"{counts['rows_kept']} rows held out of the training files"
    ends = ["trained", "not_reached"] if "rows_trained" in counts else []
    ends += ["skipped"] if counts.get("rows_skipped") else []
    reached = [_count(counts, end) for end in ends]
    kept = _count(counts, "kept") + (f" ({', '.join(reached)})" if reached else "")
    by_reason = sorted(counts["refused"].items(), key=lambda item: (-item[1], item[0]))
    reasons = ", ".join(f"{rows} {reason}" for reason, rows in by_reason)
    refused = _count(counts, "refused") + (f" ({reasons})" if reasons else "")
    return ", ".join(
        [_count(counts, "read", "rows read"), kept, _count(counts, "held_out"), refused]
    )


def _count(counts: Mapping[str, Any], end: str, text: str | None = None) -> str:
    return f"{counts[f'rows_{end}']} {text or end.replace('_', ' ')}"
