"""The data report of a run: counts, lengths, and every refused row; on the driver."""

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.dataset.ingest import LENGTHS, first_refused, nothing_usable
from orpo_ray.dataset.pair_index import are_among, iter_columns, load_keys
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
from orpo_ray.runs.files import DATA_REPORT
from orpo_ray.runs.formatting import format_rows
from orpo_ray.runs.ledger import read_ledger
from orpo_ray.storage.files import write_json
from orpo_ray.storage.folder import Folder

QUARANTINE = "quarantine"
_KINDS = ("prompt", "chosen", "rejected", "longest")
_SHOWN_ROWS = 3
_LISTED_ROWS = 10_000
_REFUSED = pa.schema(
    {
        "file": pa.string(),
        "row": pa.int64(),
        "reason": pa.string(),
        "detail": pa.string(),
        "excerpt": pa.string(),
    }
)
Tally = npt.NDArray[np.int64]


def write_data_report(
    run_directory: Path,
    token_sets: Mapping[str, TokenSet],
    config: ORPOConfig,
    names: Mapping[str, str],
    passed_over: Mapping[str, PassedOver] | None = None,
) -> dict[str, Any]:
    """Write `data_report.json` and what is in `quarantine/` for every data set.

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
        report[shown]["passed_over"] = _passed_over(counts, (passed_over or {}).get(name, {}))
        _list_refused(run_directory, shown, tokens)
    if train is not None:
        report[TRAIN]["overlapping_pairs"] = _overlaps(token_sets)
        if config.orpo.chosen_alone:
            report[TRAIN]["unused_tokens"] = n_tokens(length_tallies(train)["rejected"])
    save_report(run_directory, report)
    return report


def _passed_over(counts: Mapping[str, Any], found: PassedOver) -> dict[str, Any]:
    """What was passed over by reason, and the files that turned out to have no row."""
    empty = [path for path, part in counts["sources"].items() if not part["rows_read"]]
    more = counts.get("more_sources", {})
    names = tuple(PurePosixPath(path).name for path in (*empty, *more.get("first_empty", ())))
    n_empty = len(empty) + more.get("empty", 0)
    merged = merge_passed_over([found, {EMPTY: (n_empty, names)} if n_empty else {}])
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
    """List the refused rows: for people, and where those are not all of them as a table, too.

    People get the first ones, and some of every reason.
    """
    folder = run_directory / QUARANTINE
    listed, table = folder / f"{name}.jsonl", folder / f"{name}.parquet"
    listed.unlink(missing_ok=True)
    table.unlink(missing_ok=True)
    if not tokens.report["quarantine"]:
        return
    folder.mkdir(exist_ok=True)
    lines = _refused_lines(tokens)
    if tokens.report["rows_refused"] <= _LISTED_ROWS:
        with listed.open("wb") as file:
            file.writelines(lines)
        return
    n_listed, by_reason = 0, Counter[str]()
    with listed.open("wb") as file, pq.ParquetWriter(table, _REFUSED) as writer:
        for batch in iter(lambda: list(itertools.islice(lines, _LISTED_ROWS)), []):
            rows = [json.loads(line) for line in batch]
            writer.write_table(pa.Table.from_pylist(list(map(_printable, rows)), _REFUSED))
            for line, row in zip(batch, rows, strict=True):
                by_reason[row["reason"]] += 1
                if n_listed < _LISTED_ROWS or by_reason[row["reason"]] <= _SHOWN_ROWS:
                    file.write(line)
                    n_listed += 1


def _printable(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without halves of a character, which JSON has of damaged texts and Parquet cannot."""
    return {
        name: value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value
        for name, value in row.items()
    }


def _refused_lines(tokens: TokenSet) -> Iterator[bytes]:
    """The lines of all quarantine files of a token set."""
    for source in tokens.report["quarantine"]:
        with tokens.folder.fetch_file(source, once=True).open("rb") as part:
            yield from part


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
    mean, largest = n_tokens(tally) / n_pairs, int(tally.nonzero()[0][-1])
    return {"mean": round(mean, 1)} | quantiles | {"max": largest}


def n_tokens(tally: Tally) -> int:
    """The sum of tallied lengths."""
    return int(tally @ np.arange(len(tally)))


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
    parts = iter_columns(train, "prompt_keys", "held")
    return sum(int(are_among(keys[~held], elsewhere).sum()) for keys, held in parts)


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
        (counts.get("unused_tokens", 0), "tokens of rejected answers that are not used"),
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
    marks = _RowMarks(train)
    for block in read_ledger(run_directory):
        marks.add(block.rows, _TRAINED)
        marks.add(block.skipped, _SKIPPED)
    trained, skipped = marks.counts()
    counted = dict(report[TRAIN])
    sources = {}
    for source, (path, part) in enumerate(counted["sources"].items()):
        ends = {"rows_trained": int(trained[source]), "rows_skipped": int(skipped[source])}
        sources[path] = part | ends | {"rows_not_reached": part["rows_kept"] - sum(ends.values())}
    total = {"rows_trained": int(trained.sum()), "rows_skipped": int(skipped.sum())}
    total["rows_not_reached"] = counted["rows_kept"] - sum(total.values())
    return dict(report) | {TRAIN: counted | {"sources": sources} | total}


_KEPT, _TRAINED, _SKIPPED = 1, 2, 4


class _RowMarks:
    """What became of the rows of every source file: one byte per row, up to the last kept one."""

    def __init__(self, tokens: TokenSet) -> None:
        n_rows = np.zeros(len(tokens.sources), np.int64)
        for source, row in iter_columns(tokens.folder, "sources", "rows"):
            np.maximum.at(n_rows, source, row + 1)
        self._firsts = np.concatenate([[0], np.cumsum(n_rows)])
        self._marks = np.zeros(int(self._firsts[-1]), np.uint8)
        for source, row, held in iter_columns(tokens.folder, "sources", "rows", "held"):
            self._marks[(self._firsts[source] + row)[~held]] |= _KEPT

    def add(self, rows: npt.NDArray[np.int64], mark: int) -> None:
        """Mark rows, each as source and row from 1."""
        source, row = rows[rows[:, 0] < len(self._firsts) - 1].T
        place = self._firsts[source] + row - 1
        self._marks[place[place < self._firsts[source + 1]]] |= mark

    def counts(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """For every file the kept rows that were trained, and those that were skipped only."""
        trained = self._marks & (_KEPT | _TRAINED) == _KEPT | _TRAINED
        skipped = self._marks == _KEPT | _SKIPPED
        return self._per_file(trained), self._per_file(skipped)

    def _per_file(self, found: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """Of how many rows of each file it is true."""
        return np.diff(np.searchsorted(np.flatnonzero(found), self._firsts))
