"""Label-noise report: rows that may be labelled the wrong way round; on the driver.

The margins of a row come from all over the run. They are brought together on disk, some millions
of rows at a time, so that memory does not grow with the run.
"""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from orpo_ray.runs.evaluations import latest, read_evaluations
from orpo_ray.runs.files import read_metrics
from orpo_ray.runs.ledger import read_ledger, read_margins
from orpo_ray.runs.metrics import BY_NAME
from orpo_ray.storage.files import replacing
from orpo_ray.storage.partitions import Partitions

SUSPECTS = "suspects.jsonl"
"""The first rows, for people."""
ALL_MARGINS = "suspects.parquet"
"""All rows, in the order of the files."""
_SHOWN_ROWS = 10_000
_AROUND = 25  # steps to each side
_LEAST_KNOWLEDGE = 0.01
_ENOUGH_PASSES, _CHANCE, _Z95 = 2, 0.5, 1.96
_ACCURACY = "rewards/accuracies"
Numbers = npt.NDArray[np.int64]
Column = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RowMargins:
    """The margins of some trained rows.

    A row whose chosen answer stays the less likely one, pass after pass, while the model learns
    from all the others, is likely to be labelled the wrong way round: a margin is taken before
    the update that the row itself contributes to. This is the idea of dataset cartography
    (Swayamdipta et al. 2020, arXiv:2009.10795) with the margin in place of the confidence.

    A margin of a model that cannot tell answers apart yet means nothing. So margins are weighted
    by how much the model knew then: `(2 a - 1)^2`, with `a` the share of positive margins in the
    steps around it. The mean alone decides the order; the spread says how much the passes agree.

    Args:
        sources: index of the source file.
        rows: row there, from 1.
        mean: over the passes (and over the pairs of a ranking), weighted, in nats a token.
        spread: standard deviation of the same, weighted.
        count: margins seen.
    """

    sources: Numbers
    rows: Numbers
    mean: Column
    spread: Column
    count: Numbers

    def first(self, other: "RowMargins", n: int) -> "RowMargins":
        """The `n` most suspicious rows of these and others, which come later in the files."""
        columns = zip(vars(self).values(), vars(other).values(), strict=True)
        both = [np.concatenate(column) for column in columns]
        order = np.argsort(both[2], kind="stable")[:n]
        return RowMargins(*(column[order] for column in both))

    @staticmethod
    def none() -> "RowMargins":
        """Of no row."""
        numbers, column = np.empty(0, np.int64), np.empty(0)
        return RowMargins(numbers, numbers, column, column, numbers)


@dataclass(frozen=True)
class _Steps:
    """The steps of a run whose rows and margins are known.

    Args:
        steps: their numbers.
        weights: of their margins.
        n_margins: of all of them.
        firsts: of the rows of each source file in one numbering of all rows, and their number.
    """

    steps: Numbers
    weights: Column
    n_margins: int
    firsts: Numbers

    @staticmethod
    def from_files(run_directory: Path, n_sources: int) -> "_Steps":
        """Of a run, finished or not."""
        last = np.zeros(n_sources, np.int64)
        in_ledger, in_margins = [np.empty((2, 0), np.int64)], [np.empty((3, 0), np.int64)]
        for block in read_ledger(run_directory):
            in_ledger.append(np.stack([block.steps, block.sizes]))
            source, row = block.rows[block.rows[:, 0] < n_sources].T
            np.maximum.at(last, source, row)
        for found in read_margins(run_directory):
            positive = np.concatenate([[0], np.cumsum(found.margins > 0)])
            ends = np.cumsum(found.sizes)
            right = positive[ends] - positive[ends - found.sizes]
            in_margins.append(np.stack([found.steps, found.sizes, right]))
        ledger, margins = np.concatenate(in_ledger, 1), np.concatenate(in_margins, 1)
        steps, ours, theirs = np.intersect1d(ledger[0], margins[0], True, return_indices=True)
        known = (ledger[1, ours] == margins[1, theirs]) & (margins[1, theirs] > 0)
        sizes, right = margins[1:, theirs[known]]
        firsts = np.concatenate([[0], np.cumsum(last)])
        return _Steps(steps[known], _knowledge(right, sizes), int(sizes.sum()), firsts)

    def weigh(self, steps: Numbers, sizes: Numbers) -> tuple[npt.NDArray[np.bool_], Column]:
        """For each row of some steps whether the step is known, and its weight if so."""
        if not len(self.steps):
            return np.zeros(int(sizes.sum()), bool), np.empty(0)
        place = np.minimum(np.searchsorted(self.steps, steps), len(self.steps) - 1)
        known = self.steps[place] == steps
        return np.repeat(known, sizes), np.repeat(self.weights[place[known]], sizes[known])


def _knowledge(right: Numbers, sizes: Numbers) -> Column:
    """Weight of every step: how well answers were distinguished in the steps around it."""
    rights, totals = (np.concatenate([[0], np.cumsum(n)]) for n in (right, sizes))
    at = np.arange(len(sizes))
    low, high = np.maximum(at - _AROUND, 0), np.minimum(at + _AROUND + 1, len(sizes))
    accuracy = (rights[high] - rights[low]) / (totals[high] - totals[low])
    squares: Column = np.maximum(2 * accuracy - 1, _LEAST_KNOWLEDGE) ** 2
    return squares


def row_margins(run_directory: Path, n_sources: int) -> Iterator[RowMargins]:
    """The margins of all rows of a run in the order of the files, some millions at a time.

    Args:
        run_directory: of a run, finished or not.
        n_sources: source files of its data; the ledger may begin with other, earlier data.
    """
    known = _Steps.from_files(run_directory, n_sources)
    n_rows = int(known.firsts[-1])
    with closing(Partitions(known.n_margins, run_directory)) as partitions:
        width = max(1, -(-n_rows // partitions.n_parts))
        margins, rest = _known_margins(run_directory, known), np.empty(0)
        for block in read_ledger(run_directory):
            is_known, weights = known.weigh(block.steps, block.sizes)
            while len(rest) < len(weights):
                rest = np.concatenate([rest, next(margins)])
            values, rest = rest[: len(weights)], rest[len(weights) :]
            source, row = block.rows[is_known].T
            ours = source < n_sources
            place = known.firsts[source[ours]] + row[ours] - 1
            as_bits = (column[ours].view(np.uint64) for column in (weights, values))
            partitions.add(place // width, place, *as_bits)
        for part, (places, *columns) in enumerate(partitions.read(3)):
            first = part * width
            local = (places - np.uint64(first)).astype(np.int64)
            weight, margin = (np.ascontiguousarray(c).view(np.float64) for c in columns)
            yield _summed(local, weight, margin, first, known)


def _known_margins(run_directory: Path, known: _Steps) -> Iterator[Column]:
    """The margins of the known steps, in blocks."""
    for block in read_margins(run_directory):
        is_known, _ = known.weigh(block.steps, block.sizes)
        yield block.margins[is_known]


def _summed(
    local: Numbers, weights: Column, margins: Column, first: int, known: _Steps
) -> RowMargins:
    """Mean and spread of each row, of entries in the order of steps."""
    n_rows = int(local.max(initial=-1)) + 1
    count = np.bincount(local, minlength=n_rows)
    seen = np.flatnonzero(count)

    def total(values: Column) -> Column:
        return np.asarray(np.bincount(local, values, n_rows), np.float64)

    with np.errstate(invalid="ignore"):
        weight = total(weights)
        mean = total(weights * margins) / weight
        spread = np.sqrt(total(weights * (margins - mean[local]) ** 2) / weight)
    source = np.searchsorted(known.firsts, first + seen, side="right") - 1
    row = first + seen - known.firsts[source] + 1
    return RowMargins(source, row, mean[seen], spread[seen], count[seen])


def write_suspects(run_directory: Path, sources: Sequence[str]) -> Path:
    """Write `suspects.parquet`, and the most suspicious rows of it to `suspects.jsonl`.

    Args:
        run_directory: of a run.
        sources: of its training data, in the order in which the ledger counts them.
    """
    top = RowMargins.none()
    names = pa.array(sources, pa.string())
    with replacing(run_directory / ALL_MARGINS) as path, pq.ParquetWriter(path, _SCHEMA) as writer:
        for found in row_margins(run_directory, len(sources)):
            top = top.first(found, _SHOWN_ROWS)
            files = pa.DictionaryArray.from_arrays(pa.array(found.sources, pa.int32()), names)
            columns = [found.rows, found.mean, found.spread, found.count]
            writer.write_table(
                pa.Table.from_arrays([files, *map(pa.array, columns)], schema=_SCHEMA)
            )
    with replacing(run_directory / SUSPECTS) as path, path.open("w", encoding="utf-8") as file:
        columns = [
            top.sources.tolist(),
            top.rows.tolist(),
            top.mean,
            top.spread,
            top.count.tolist(),
        ]
        for source, row, mean, spread, count in zip(*columns, strict=True):
            line = {
                "file": sources[source],
                "row": row,
                "margin_mean": float(f"{mean:.6g}"),
                "margin_spread": float(f"{spread:.6g}"),
                "passes": count,
            }
            file.write(json.dumps(line) + "\n")
    return run_directory / SUSPECTS


_SCHEMA = pa.schema(
    [
        ("file", pa.dictionary(pa.int32(), pa.string())),
        ("row", pa.int64()),
        ("margin_mean", pa.float64()),
        ("margin_spread", pa.float64()),
        ("passes", pa.int64()),
    ]
)


def too_early_to_tell(run_directory: Path) -> str | None:
    """Why no label can be called wrong yet; None where the order of `suspects.jsonl` tells them.

    A model that does not tell answers apart finds half of all pairs the other way round. So it
    takes two passes over the data, or an accuracy that is above chance: the held-out one of the
    last evaluation, or that of the last half of the trained pairs, each before its own update.
    """
    lines = read_metrics(run_directory)
    epochs = lines[-1]["epoch"] if lines else 0.0
    if epochs >= _ENOUGH_PASSES:
        return None
    evaluations = latest(read_evaluations(run_directory, lines)).values()
    lows = [low for found in evaluations for low in found.value(BY_NAME[_ACCURACY])[1:2]]
    lows.append(_trained_accuracy_low(run_directory))
    if any(low is not None and low > _CHANCE for low in lows):
        return None
    return (
        f"{epochs:.3g} passes over the data, of {_ENOUGH_PASSES} that it takes, and no accuracy "
        "that is above chance"
    )


def _trained_accuracy_low(run_directory: Path) -> float:
    """Lower end of the 95 % interval of the accuracy over the last half of the trained pairs.

    Source: Wilson 1927.
    """
    signs = [block.margins > 0 for block in read_margins(run_directory)]
    n = sum(map(len, signs)) // 2
    right, left = 0, n
    for part in reversed(signs):
        right += int(part[max(0, len(part) - left) :].sum())
        left -= min(left, len(part))
    if not n:
        return 0.0
    share, z2 = right / n, _Z95**2
    half = _Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return (share + z2 / (2 * n) - half) / (1 + z2 / n)


def first_suspects(run_directory: Path, n: int) -> list[dict[str, Any]]:
    """The first lines of `suspects.jsonl` whose answers the model finds the other way round."""
    path = run_directory / SUSPECTS
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        lines = [json.loads(text) for text in itertools.islice(file, n)]
    return [line for line in lines if line["margin_mean"] < 0]
