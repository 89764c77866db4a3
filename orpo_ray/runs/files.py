"""The files of a run directory: names, and the text that rank 0 writes and anyone reads."""

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orpo_ray.preference.groups import RowId
from orpo_ray.storage.files import one_line, read_json, read_lines
from orpo_ray.storage.folder import Folder
from orpo_ray.storage.hiding import hide
from orpo_ray.storage.relocation import EXPORT_RECORD

CONFIG = "config.yaml"
DATA_REPORT = "data_report.json"
METRICS = "metrics.jsonl"
LEDGER = "ledger.jsonl"
EVENTS = "events.jsonl"
LOG = "run.log"
MARGINS = "margins.jsonl"
EVALUATIONS = "evaluations.jsonl"
SAMPLES = "samples.jsonl"
STOP = "stop-requested"
FINISH = "finish-requested"
REQUESTS = "requests.json"
FINAL = "final"
RECORD = EXPORT_RECORD
# Of a sweep: the folder of its trials, and the record of each trial.
TRIALS, TRIAL_RECORD = "trials", "trial.json"
# Parts of a worker's time; each is a metric, in seconds since the previous line.
TIME_PARTS = (
    "data_wait",
    "forward_backward",
    "optimizer",
    "checkpoint",
    "evaluation",
    "samples",
)
TIME_PREFIX = "seconds/"
# Files whose lines belong to a step, besides the ledger.
_BY_STEP = (METRICS, MARGINS, EVALUATIONS, SAMPLES)
# Files that rank 0 alone writes, besides checkpoints and `final/`.
WRITTEN_BY_WORKERS = (*_BY_STEP, LEDGER, EVENTS, LOG)


@dataclass(frozen=True)
class RunFiles:
    """The files that a run writes: lines of JSON by step, events and a log; rank 0 writes.

    Lines that cannot be written because the disk is full are kept, and written before the next.
    """

    folder: Folder
    is_writer: bool
    unwritten: dict[str, list[str]] = field(default_factory=dict)

    @property
    def directory(self) -> Path:
        """Where the files are on this node."""
        return self.folder.path

    @property
    def stop_requested(self) -> bool:
        """Whether the driver asks for a last checkpoint; for the writer only."""
        return self.is_writer and (self.directory / STOP).exists()

    @property
    def finish_requested(self) -> bool:
        """Whether the driver asks that the next step be the last; for the writer only."""
        return self.is_writer and (self.directory / FINISH).exists()

    def requests(self) -> tuple[int, int]:
        """How many checkpoints and evaluations the driver has asked for; for the writer only."""
        found = read_json(self.directory / REQUESTS) if self.is_writer else {}
        return int(found.get("saves", 0)), int(found.get("evaluations", 0))

    def notice(self, text: str) -> None:
        """Add a line to the log, which the driver shows, without secrets."""
        self._append(LOG, hide(text) + "\n")

    def event(self, text: str, **counts: int) -> None:
        """Log an event that should not occur in a run, and record its counts."""
        self.notice(text)
        counts = {kind: count for kind, count in counts.items() if count}
        line = {"time": time.time(), "text": hide(text), "counts": counts}
        self._append(EVENTS, json.dumps(line) + "\n")

    def rewind(self, step: int) -> int:
        """Remove the lines of steps after `step`, which will be repeated.

        Returns:
            How many steps that is.
        """
        if not self.is_writer:
            return 0
        for name in _BY_STEP:
            _cut_after(self.directory / name, step)
        dropped, kept = _cut_after(self.directory / LEDGER, step)
        if kept != max(step, 0):
            text = f"{LEDGER} holds {kept} of the {step} steps before the checkpoint"
            self.event(text, ledger_gaps=1)
        return dropped

    def ledger(
        self, step: int, epoch: int, rows: Sequence[RowId], left_out: Sequence[RowId]
    ) -> None:
        """Add one step to the ledger; a row is [index of its source file, row there from 1]."""
        line: dict[str, Any] = {"step": step, "epoch": epoch, "rows": _places(rows)}
        if left_out:
            line["skipped"] = _places(left_out)
        self._append(LEDGER, json.dumps(line, separators=(",", ":")) + "\n")

    def margins(self, step: int, margins: Sequence[float]) -> None:
        """Add one step's margins, in nats a token, in the order of the rows in the ledger."""
        shown = ",".join(f"{margin:.6g}" for margin in margins)
        self._append(MARGINS, f'{{"step":{step},"margins":[{shown}]}}\n')

    def evaluation(self, step: int, prefix: str, pairs: int, estimates: Mapping[str, Any]) -> None:
        """Add the estimates of one evaluation set as `[value, low, high]`."""
        line = {"step": step, "set": prefix, "pairs": pairs, "figures": dict(estimates)}
        self._append(EVALUATIONS, _json_line(line))

    def sample(self, step: int, prompt: str, answer: str, chosen: str | None) -> None:
        """Add the model's answer to a prompt, and the preferred answer if it is known."""
        line = {"step": step, "prompt": prompt, "answer": answer, "chosen": chosen}
        self._append(SAMPLES, _json_line(line))

    def metrics(self, line: dict[str, Any]) -> None:
        """Add one line to the metrics; `time` is in seconds since 1970."""
        self._append(METRICS, _json_line(line | {"time": time.time()}))

    def sync(self) -> str | None:
        """Sync the files that the next checkpoint relies on to disk; returns the error, if any."""
        try:
            for name in (*_BY_STEP, LEDGER) if self.is_writer else ():
                if not (self.directory / name).exists() and not self.unwritten.get(name):
                    continue
                self._write(name)
                with (self.directory / name).open("a") as file:
                    os.fsync(file.fileno())
        except OSError as error:
            return one_line(error)
        return None

    def _append(self, name: str, text: str) -> None:
        """Write a line, or keep it until there is room."""
        if self.is_writer:
            self.unwritten.setdefault(name, []).append(text)
            with contextlib.suppress(OSError):
                self._write(name)

    def _write(self, name: str) -> None:
        """Write all lines that wait for it, or none of them."""
        path, waiting = self.directory / name, self.unwritten.get(name, [])
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("a", encoding="utf-8") as file:
                file.writelines(waiting)
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(path, size)
            raise
        waiting.clear()


def holds_run(directory: Path) -> bool:
    """Whether a run or a sweep was begun in a directory, be it of no step yet."""
    return any((directory / name).exists() for name in (METRICS, LEDGER, LOG, TRIALS))


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """All whole lines of a run's metrics."""
    return read_lines(directory / METRICS)


class NewLines:
    """Reads a file of JSON lines that grows, each time what is new of it.

    A file that has become shorter, as where a run resumes from a checkpoint, is read from its
    beginning.

    Args:
        path: of the file, which need not exist.
        n_bytes_read: in all.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.n_bytes_read = 0
        self._offset = 0

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """The whole lines since the last call, and whether those are all lines of the file."""
        if not self.path.exists():
            self._offset = 0
            return [], True
        with self.path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self._offset or not self._is_at_line(file):
                self._offset = 0
            begins = self._offset == 0
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.n_bytes_read += len(text)
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()], begins

    def _is_at_line(self, file: Any) -> bool:
        """Whether a line begins where the last call ended."""
        file.seek(max(0, self._offset - 1))
        return self._offset == 0 or file.read(1) == b"\n"


def count_events(directory: Path) -> dict[str, int]:
    """The number of events of a run, by kind."""
    counts: dict[str, int] = {}
    for event in _events(directory):
        if isinstance(event, dict):
            for kind, count in event["counts"].items():
                counts[kind] = counts.get(kind, 0) + count
    return counts


def read_events(directory: Path) -> list[tuple[float | None, str]]:
    """Time and text of the events of a run; a torn line has no time, and its text as it is."""
    return [
        (event["time"], event["text"]) if isinstance(event, dict) else (None, event)
        for event in _events(directory)
    ]


def _events(directory: Path) -> list[dict[str, Any] | str]:
    """The whole lines of the events: parsed, or as text where a killed writer left half of one."""
    path = directory / EVENTS
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    events: list[dict[str, Any] | str] = []
    for line in text[: text.rfind("\n") + 1].splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            events.append(line)
    return events


def exported_step(folder: Path) -> int | None:
    """The step of the model that lies in an export folder, or None when there is none."""
    record = read_json(folder / RECORD)
    return int(record["step"]) if record else None


def summary(directory: Path) -> dict[str, dict[str, float]]:
    """The metrics at the start and at the end of a run.

    Returns:
        `train` (last logged step), `before` (the evaluation before the first step) and `after`
        (that of the model in `final/`, else the last one); empty where there is none.
    """
    lines = read_metrics(directory)
    train = [line for line in lines if "loss" in line]
    evals = [
        {key: value for key, value in line.items() if key.startswith("eval_") or key == "step"}
        for line in lines
        if any(key.startswith("eval_") for key in line)
    ]
    exported = exported_step(directory / FINAL)
    after = [line for line in evals if line["step"] == exported] or evals
    return {
        "train": train[-1] if train else {},
        "before": evals[0] if evals and evals[0]["step"] == 0 else {},
        "after": after[-1] if after else {},
    }


def _places(rows: Sequence[RowId]) -> list[list[int]]:
    return [[row_id.source, row_id.row + 1] for row_id in rows]


def _cut_after(path: Path, step: int) -> tuple[int, int]:
    """Truncate a file of steps behind `step`; returns how many were dropped and kept."""
    if not path.exists():
        return 0, 0
    end, dropped, kept = 0, 0, 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                continue  # torn
            if json.loads(line)["step"] <= step:
                end += len(line)
                kept += 1
            else:
                dropped += 1
    os.truncate(path, end)
    return dropped, kept


def _json_line(line: dict[str, Any]) -> str:
    """One line of strict JSON: values that are not finite become null."""
    return json.dumps(_strict(line), allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _strict(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
