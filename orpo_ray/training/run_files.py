"""The files of a run directory: names, and the text that rank 0 writes and anyone reads."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
LOG = "run.log"
FINAL = "final"
# What differs between two runs that are otherwise the same to the byte.
TIMING = ("time", "pairs_per_s", "tokens_per_s")


@dataclass(frozen=True)
class RunFiles:
    """`metrics.jsonl` and `run.log` of a run; other ranks than 0 write nothing."""

    directory: Path
    is_writer: bool

    def notice(self, text: str) -> None:
        """Add a line to the log, which the driver shows."""
        if self.is_writer:
            with (self.directory / LOG).open("a") as file:
                file.write(text + "\n")

    def rewind(self, step: int) -> int:
        """Drop the metrics of steps after `step`, which will be done again; returns how many."""
        path = self.directory / METRICS
        if not self.is_writer or not path.exists():
            return 0
        lines = read_metrics(self.directory)
        kept = [line for line in lines if line["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(_json_line(line) for line in kept))
        temporary.replace(path)
        return len(lines) - len(kept)

    def metrics(self, line: dict[str, Any]) -> None:
        """Add one line to the metrics; `time` is in seconds since 1970."""
        if self.is_writer:
            with (self.directory / METRICS).open("a") as file:
                file.write(_json_line(line | {"time": time.time()}))


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """All whole lines of a run's metrics; a torn last one is left out."""
    path = directory / METRICS
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in whole.splitlines()]


def summary(directory: Path) -> dict[str, dict[str, float]]:
    """The figures at the start and at the end of a run.

    Returns:
        `train` (last logged step), `before` and `after` (first and last evaluation); empty
        where there is none.
    """
    lines = read_metrics(directory)
    train = [line for line in lines if "loss" in line]
    evals = [
        {key: value for key, value in line.items() if key.startswith("eval_") or key == "step"}
        for line in lines
        if any(key.startswith("eval_") for key in line)
    ]
    return {
        "train": train[-1] if train else {},
        "before": evals[0] if evals and evals[0]["step"] == 0 else {},
        "after": evals[-1] if evals else {},
    }


def _json_line(line: dict[str, Any]) -> str:
    """One line of strict JSON: figures that are not finite become null."""
    strict = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in line.items()
    }
    return json.dumps(strict, allow_nan=False) + "\n"
