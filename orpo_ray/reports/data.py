"""The data report of a run: counts, lengths, and every refused row; on the driver."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.dataset.ingest import LENGTHS, first_refused, nothing_usable
from orpo_ray.dataset.pair_index import PairStats, are_among
from orpo_ray.dataset.regroup import load_keys
from orpo_ray.dataset.request import TRAIN
from orpo_ray.dataset.shards import TokenSet
from orpo_ray.preference.errors import DataError
from orpo_ray.preference.reading.finding import (
    EMPTY,
    PassedOver,
    merge_passed_over,
    passed_over_text,
)
from orpo_ray.preference.records import NOTE_TEXTS, ON_REQUEST, Note, Reason
from orpo_ray.runs.files import DATA_REPORT, LEDGER
from orpo_ray.runs.formatting import format_rows
from orpo_ray.storage.files import write_json
from orpo_ray.storage.folder import Folder

QUARANTINE = "quarantine"
_KINDS = ("prompt", "chosen", "rejected", "longest")
_SHOWN_ROWS, _SHOWN_TEXT = 3, 200
Tally = npt.NDArray[np.int64]


def write_data_report(
    run_directory: Path,
    token_sets: Mapping[str, TokenSet],
    config: ORPOConfig,
    names: Mapping[str, str],
    passed_over: Mapping[str, PassedOver] | None = None,
) -> dict[str, Any]:
    """Write `data_report.json` and `quarantine/<name>.jsonl` for every data set.

    Args:
        run_directory: must exist.
        token_sets: by their name in the feed.
        config: of the run.
        names: of source files, where they have other names than their paths.
        passed_over: what was not read of the folders and globs of a data set.

    Returns:
        The content of the file, by data set.

    Raises:
        AssertionError: when rows are neither kept nor refused nor held out, which would be a bug.
    """
    train = token_sets.get(TRAIN)
    report = {}
    for name, tokens in token_sets.items():
        shown = name.rstrip("_")
        if tokens.is_held_out:
            report[shown] = {"rows_kept": tokens.report["rows_held_out"], "pairs": tokens.n_pairs}
            continue
        counts = {key: value for key, value in tokens.report.items() if key != "quarantine"}
        for part in (counts, *counts["sources"].values()):
            if part["rows_read"] != sum(
                part[f"rows_{end}"] for end in ("kept", "refused", "held_out")
            ):
                raise AssertionError(f"{name}: {part} does not add up")
        sources = {
            path: ({"name": names[path]} if path in names else {}) | part
            for path, part in counts["sources"].items()
        }
        report[shown] = counts | {"sources": sources} | _lengths(tokens, config)
        report[shown]["passed_over"] = _passed_over(sources, (passed_over or {}).get(name, {}))
        _list_refused(run_directory, shown, tokens)
    if train is not None:
        report[TRAIN]["overlapping_pairs"] = _overlaps(token_sets)
    save_report(run_directory, report)
    return report


def _passed_over(sources: Mapping[str, Any], found: PassedOver) -> dict[str, Any]:
    """What was passed over by reason, and the files that turned out to have no row."""
    names = [PurePosixPath(path).name for path, part in sources.items() if not part["rows_read"]]
    merged = merge_passed_over([found, {EMPTY: (len(names), tuple(names))} if names else {}])
    return {
        reason: {"files": number, "first": list(first)}
        for reason, (number, first) in merged.items()
    }


def source_label(path: str, part: Mapping[str, Any]) -> str:
    """Label of a source file in tables: its path, after the name that the user gave it."""
    return f"{part['name']}: {path}" if "name" in part else path


def save_report(run_directory: Path, report: Mapping[str, Any]) -> None:
    """Write `data_report.json` atomically."""
    write_json(run_directory / DATA_REPORT, report, indent=1)


def _list_refused(run_directory: Path, name: str, tokens: TokenSet) -> None:
    listed = run_directory / QUARANTINE / f"{name}.jsonl"
    listed.unlink(missing_ok=True)
    if not tokens.report["quarantine"]:
        return
    listed.parent.mkdir(exist_ok=True)
    with listed.open("w", encoding="utf-8") as file:
        for source in tokens.report["quarantine"]:
            part = tokens.folder.fetch_file(source, once=True)
            file.write(part.read_text(encoding="utf-8"))


def length_tallies(tokens: TokenSet) -> dict[str, Tally]:
    """How many pairs have a prompt, a chosen or a rejected answer, a longer side of n tokens."""
    with np.load(tokens.folder.fetch_file(LENGTHS, once=True)) as arrays:
        return {kind: arrays[kind] for kind in _KINDS}


def _lengths(tokens: TokenSet, config: ORPOConfig) -> dict[str, Any]:
    """Lengths, and the tokens that padding would have cost."""
    tallies = length_tallies(tokens)
    batch = config.train.per_device_train_batch_size
    return {
        "lengths": {kind: _spread(tally) for kind, tally in tallies.items()},
        "padded_tokens": round(_padded_tokens(tallies["longest"], batch)),
    }


def _spread(tally: Tally) -> dict[str, float]:
    """Mean, quantiles and maximum of tallied lengths, in tokens."""
    n_pairs = int(tally.sum())
    if not n_pairs:
        return {}
    below = tally.cumsum()
    quantiles = {f"p{q}": int(np.searchsorted(below, n_pairs * q / 100)) for q in (5, 50, 95)}
    mean = float((tally * np.arange(len(tally))).sum() / n_pairs)
    return {"mean": round(mean, 1)} | quantiles | {"max": int(tally.nonzero()[0][-1])}


def _padded_tokens(longest: Tally, batch_pairs: int) -> float:
    """Tokens of all pairs in padded batches: two rows a pair, as long as the batch's longest.

    The mean over all ways to draw batches: E[max of B] = sum over n of n (F(n)^B - F(n - 1)^B).
    """
    n_pairs = int(longest.sum())
    if not n_pairs:
        return 0.0
    below = (longest.cumsum() / n_pairs) ** min(batch_pairs, n_pairs)
    expected = float((np.arange(len(longest)) * np.diff(below, prepend=0.0)).sum())
    return 2 * n_pairs * expected


def _overlaps(token_sets: Mapping[str, TokenSet]) -> int:
    """Training pairs whose prompt a set of evaluation files has too, even the same files."""
    train = token_sets[TRAIN].folder
    others = {t.folder for name, t in token_sets.items() if name != TRAIN and not t.is_held_out}
    if not others:
        return 0
    elsewhere = np.unique(np.concatenate([load_keys(other, "prompt_keys") for other in others]))
    parts = (PairStats.load(train, name) for name in PairStats.names(train))
    return sum(int(are_among(part.prompt_keys[~part.held], elsewhere).sum()) for part in parts)


def data_lines(name: str, counts: Mapping[str, Any]) -> list[str]:
    """The rows of a data set on one line, and what else there is to know on another."""
    text = f"{name} data: {format_rows(counts)}"
    if "rows_read" not in counts:
        return [text]
    if counts["shapes"]:
        text += f"; {', '.join(counts['shapes'])}"
    found = [
        (counts["truncated_prompts"], "prompts truncated"),
        (counts["truncated_completions"], "pairs with a truncated answer"),
        (counts["pairs_left_out"], "pairs left out of rows that are kept"),
        (counts["duplicate_pairs"], "duplicate pairs (drop_duplicates)"),
        (
            counts.get("contradicting_pairs", 0),
            "pairs that another pair contradicts (chosen and rejected swapped)",
        ),
        (
            counts.get("overlapping_pairs", 0),
            "pairs with a prompt of an evaluation set (drop_overlap)",
        ),
    ]
    notes = [f"{count} {what}" for count, what in found if count]
    if counts["ignored_columns"]:
        notes.append(f"columns ignored: {', '.join(counts['ignored_columns'])}")
    lines = [text, f"{name} data: {'; '.join(notes)}"] if notes else [text]
    for note, found in counts.get("notes", {}).items():
        lines.append(
            f"{name} data: {found['rows']} {NOTE_TEXTS[Note(note)]} (first: {found['first']})"
        )
    if counts.get("passed_over"):
        lines.append(f"{name} data: {passed_over_line(counts)}")
    return lines


def passed_over_line(counts: Mapping[str, Any]) -> str:
    """What was passed over in the folders and globs of a data set."""
    passed_over = {
        reason: (part["files"], part["first"]) for reason, part in counts["passed_over"].items()
    }
    return f"passed over: {passed_over_text(passed_over)}"


def first_pair_lines(tokens: TokenSet, tokenizer: Any, nll_scope: str) -> list[str]:
    """The first pair as the model receives it, and which parts are trained."""
    group = tokens.groups(tokens.shards[0])[0]
    (row_id, *_), ((chosen, rejected), *_) = group.row_ids, group.pairs
    in_nll = "in the NLL" if nll_scope == "all" else "not trained (nll_scope=completion)"
    parts = [
        ("prompt", group.prompt, in_nll),
        ("chosen", group.completions[chosen], "in the NLL and the odds ratio"),
        ("rejected", group.completions[rejected], "in the odds ratio"),
    ]
    lines = [f"first pair, {tokens.sources[row_id.source]}:{row_id.row + 1}:"]
    for name, ids, use in parts:
        text = repr(tokenizer.decode(ids))
        shown = text if len(text) <= _SHOWN_TEXT else f"{text[:90]} ... {text[-90:]}"
        lines.append(f"  {name}, {len(ids)} tokens, {use}: {shown}")
    return lines


def refuse_bad_data(run: Folder, token_sets: Mapping[str, TokenSet], config: ORPOConfig) -> None:
    """Stop before training when no row is left, too many are refused, or one must not be.

    Raises:
        DataError: with the counts, the first rows, and where all of them are listed.
    """
    problems: list[str] = []
    for name, tokens in token_sets.items():
        if tokens.is_held_out:  # its files were checked
            continue
        report, shown = tokens.report, name.rstrip("_")
        problems += nothing_usable(tokens)
        if not report["rows_read"] or not tokens.n_pairs:
            continue
        listed = f"all in {run}/{QUARANTINE}/{shown}.jsonl"
        bad = {reason: n for reason, n in report["refused"].items() if reason not in ON_REQUEST}
        share = sum(bad.values()) / report["rows_read"]
        if share > config.data.max_bad_fraction:
            counts = ", ".join(f"{n} {reason}" for reason, n in bad.items())
            problems.append(
                f"{shown} data: {sum(bad.values())} of {report['rows_read']} rows are refused "
                f"({counts}), more than max_bad_fraction={config.data.max_bad_fraction}; {listed}"
            )
            problems += first_refused(tokens, _SHOWN_ROWS, bad)
        too_long = report["refused"].get(Reason.PROMPT_TOO_LONG, 0)
        if too_long and config.data.truncation == "error":
            problems.append(f"{shown} data: {too_long} prompts are too long; {listed}")
            problems += first_refused(tokens, _SHOWN_ROWS, {Reason.PROMPT_TOO_LONG})
    if problems:
        raise DataError(list(dict.fromkeys(problems)))  # two sets may be the same files


def count_trained(
    run_directory: Path, report: Mapping[str, Any], train: TokenSet
) -> dict[str, Any]:
    """Add to the report how many rows of each training file were trained or skipped, by the ledger.

    A ledger of earlier, other data may name rows that are not in the set: those are not counted.
    """
    ends = {"rows": _RowMarks(train), "skipped": _RowMarks(train)}
    with (run_directory / LEDGER).open(encoding="utf-8") as file:
        for text in file:
            line = json.loads(text)
            for key, marks in ends.items():
                marks.add(line.get(key, ()))
    counted = dict(report[TRAIN])
    sources = {}
    total: Counter[str] = Counter(rows_trained=0, rows_skipped=0, rows_not_reached=0)
    for source, path in enumerate(train.sources):
        kept = _kept_rows(train, source)
        trained = ends["rows"].of(source, kept)
        skipped = ends["skipped"].of(source, kept) & ~trained
        counts = {"rows_trained": int(trained.sum()), "rows_skipped": int(skipped.sum())}
        left = counted["sources"][path]["rows_kept"] - sum(counts.values())
        sources[path] = counted["sources"][path] | counts | {"rows_not_reached": left}
        total.update(counts | {"rows_not_reached": left})
    return dict(report) | {TRAIN: counted | {"sources": sources} | dict(total)}


class _RowMarks:
    """The rows of every source file that are in the ledger: one byte per row."""

    def __init__(self, tokens: TokenSet) -> None:
        self._marks = [bytearray() for _ in tokens.sources]

    def add(self, rows: Iterable[Sequence[int]]) -> None:
        """Mark rows, each as source and row from 1."""
        for source, row in rows:
            if source < len(self._marks):
                marks = self._marks[source]
                marks.extend(bytes(max(0, row - len(marks))))
                marks[row - 1] = 1

    def of(self, source: int, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """For some rows of a file, from 0, whether they are marked."""
        marks = np.frombuffer(bytes(self._marks[source]), dtype=bool)
        known = rows < len(marks)
        found = np.zeros(len(rows), dtype=bool)
        found[known] = marks[rows[known]]
        return found


def _kept_rows(tokens: TokenSet, source: int) -> npt.NDArray[np.int64]:
    """The rows of a file that are trained on, from 0, and those that were left out on request."""
    names = [n for n in PairStats.names(tokens.folder) if n.startswith(f"{source:05d}-")]
    parts = [PairStats.load(tokens.folder, name) for name in names]
    rows = [part.rows[~part.held] for part in parts]
    return np.unique(np.concatenate([np.empty(0, np.int64), *rows]))
