"""Label-noise report: rows that look labelled the wrong way round; on the driver."""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orpo_ray.runs.files import LEDGER, MARGINS
from orpo_ray.storage.files import replacing

SUSPECTS = "suspects.jsonl"
_AROUND = 25  # steps to each side
_LEAST_KNOWLEDGE = 0.01


@dataclass(frozen=True)
class RowMargins:
    """The margins of every trained row, most suspicious first.

    A row whose chosen answer stays the less likely one, pass after pass, while the model learns
    from all the others, is likely to be labelled the wrong way round: a margin is taken before
    the update that the row itself contributes to. This is the idea of dataset cartography
    (Swayamdipta et al. 2020, arXiv:2009.10795) with the margin in place of the confidence.

    A margin of a model that cannot tell answers apart yet means nothing. So margins are weighted
    by how much the model knew then: `(2 a - 1)^2`, with `a` the share of positive margins in the
    steps around it. The mean alone decides the order; the spread says how much the passes agree.

    Args:
        places: (rows, 2) of source file and row there, from 1.
        mean: over the passes (and over the pairs of a ranking), weighted, in nats a token.
        spread: standard deviation of the same, weighted.
        count: margins seen.
    """

    places: npt.NDArray[np.int64]
    mean: npt.NDArray[np.float64]
    spread: npt.NDArray[np.float64]
    count: npt.NDArray[np.int64]

    @staticmethod
    def from_files(run_directory: Path) -> "RowMargins":
        """The margins in the files of a run, finished or not."""
        steps = [
            (np.array(rows, np.int64), np.array(margins))
            for rows, margins in _steps(run_directory)
            if len(rows) == len(margins) > 0
        ]
        places = np.concatenate([np.zeros((0, 2), np.int64), *(rows for rows, _ in steps)])
        margins = np.concatenate([np.zeros(0), *(values for _, values in steps)])
        sizes = [len(values) for _, values in steps]
        weights = np.repeat(_knowledge([values for _, values in steps]), sizes)
        known, which = np.unique(places, axis=0, return_inverse=True)
        which = which.reshape(-1)

        def total(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            return np.asarray(np.bincount(which, values, len(known)), np.float64)

        weight = total(weights)
        mean = total(weights * margins) / weight
        spread = np.sqrt(total(weights * (margins - mean[which]) ** 2) / weight)
        order = np.argsort(mean, kind="stable")
        count = np.bincount(which, minlength=len(known))
        return RowMargins(known[order], mean[order], spread[order], count[order])


def _knowledge(margins: Sequence[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    """Weight of every step: how well answers were distinguished in the steps around it."""
    right = np.concatenate([[0], np.cumsum([(m > 0).sum() for m in margins])])
    total = np.concatenate([[0], np.cumsum([len(m) for m in margins])])
    at = np.arange(len(margins))
    low, high = np.maximum(at - _AROUND, 0), np.minimum(at + _AROUND + 1, len(margins))
    accuracy = (right[high] - right[low]) / (total[high] - total[low])
    squares: npt.NDArray[np.float64] = np.maximum(2 * accuracy - 1, _LEAST_KNOWLEDGE) ** 2
    return squares


def write_suspects(run_directory: Path, sources: Sequence[str]) -> Path:
    """Write `suspects.jsonl`, a line a row, most suspicious first.

    Args:
        run_directory: of a run.
        sources: of its training data, in the order in which the ledger counts them.
    """
    found = RowMargins.from_files(run_directory)
    path = run_directory / SUSPECTS
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        columns = (found.places.tolist(), found.mean, found.spread, found.count.tolist())
        for (source, row), mean, spread, count in zip(*columns, strict=True):
            if source >= len(sources):
                continue  # of earlier, other data, with which the run began
            line = {
                "file": sources[source],
                "row": row,
                "margin_mean": float(f"{mean:.6g}"),
                "margin_spread": float(f"{spread:.6g}"),
                "passes": count,
            }
            file.write(json.dumps(line) + "\n")
    return path


def first_suspects(run_directory: Path, n: int) -> list[dict[str, Any]]:
    """The first lines of `suspects.jsonl` whose answers the model finds the other way round."""
    lines = itertools.islice(_lines(run_directory / SUSPECTS), n)
    return [line for line in lines if line["margin_mean"] < 0]


def _steps(run_directory: Path) -> Iterator[tuple[list[Any], list[float]]]:
    """Rows and margins of every step that both files have."""
    margins = _lines(run_directory / MARGINS)
    measured = next(margins, None)
    for line in _lines(run_directory / LEDGER):
        while measured is not None and measured["step"] < line["step"]:
            measured = next(margins, None)
        if measured is not None and measured["step"] == line["step"]:
            yield line["rows"], measured["margins"]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        with path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)
