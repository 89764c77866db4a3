"""Finding pairs that repeat or contradict others, or are of another set; on the driver.

Hashes are compared in parts (`Partitions`), so that memory is about a byte a pair.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orpo_ray.dataset.chunks import QUARANTINE
from orpo_ray.dataset.pair_index import (
    Keys,
    PairStats,
    are_among,
    iter_stats,
    load_columns,
    load_keys,
)
from orpo_ray.dataset.request import IngestRequest
from orpo_ray.preference.records import Reason
from orpo_ray.storage.folder import Folder
from orpo_ray.storage.partitions import Partitions

DROPPED = f"{QUARANTINE}/dropped.jsonl"


def find_repeats(
    keys: Iterable[tuple[Keys, Keys]], n_pairs: int, folder: Path
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Find the pairs that occurred before, and those that another pair contradicts.

    Args:
        keys: `pair_keys` and `swapped_keys` of `PairStats`, a part of the pairs after the other.
        n_pairs: of all of them.
        folder: for temporary files.

    Returns:
        For every pair whether an earlier one has its key, and whether any has its swapped key.
    """
    repeated, contradicted = np.zeros(n_pairs, bool), np.zeros(n_pairs, bool)
    with (
        closing(Partitions(n_pairs, folder)) as pairs,
        closing(Partitions(n_pairs, folder)) as swapped,
    ):
        first = 0
        for pair_keys, swapped_keys in keys:
            positions = np.arange(first, first + len(pair_keys))
            first += len(pair_keys)
            pairs.add(pairs.of_hashes(pair_keys), pair_keys, positions)
            swapped.add(swapped.of_hashes(swapped_keys), swapped_keys, positions)
        for (ours, places), (others, of_others) in zip(pairs.read(2), swapped.read(2), strict=True):
            order = np.argsort(ours, kind="stable")
            ordered = ours[order]
            repeated[places[order[1:]][ordered[1:] == ordered[:-1]]] = True
            contradicted[of_others[are_among(others, ordered)]] = True
    return repeated, contradicted


def find_dropped_pairs(
    request: IngestRequest, tokens: Folder, summaries: Sequence[dict[str, Any]]
) -> list[Any]:
    """Find duplicates and overlaps with other token sets, and correct the counts in `summaries`.

    Pairs that contradict another one, which has their answers swapped, are counted and kept.

    Returns:
        For every shard a boolean array that is True for each pair to drop.
    """
    names = dict.fromkeys(summary["name"] for summary in summaries)
    keys = (load_columns(tokens, name, ["pair_keys", "swapped_keys"]) for name in names)
    n_pairs = sum(summary["n_pairs"] for summary in summaries)
    found = find_repeats(((ours, swapped) for ours, swapped in keys), n_pairs, tokens.path)
    others = [load_keys(other, "prompt_keys") for other in request.other_sets]
    elsewhere = np.unique(np.concatenate([np.empty(0, np.uint64), *others]))
    masks: list[Any] = []
    first = 0
    with _Dropped(tokens) as dropped:
        for members, stats in iter_stats(tokens, summaries):
            n_here = len(stats.rows)
            repeated, contradicted = (marks[first : first + n_here] for marks in found)
            first += n_here
            overlaps = are_among(stats.prompt_keys, elsewhere) & ~stats.held
            doubles = repeated & ~overlaps if request.drop_duplicates else np.zeros(n_here, bool)
            for summary in members:
                pairs = slice(summary["first_pair"], summary["first_pair"] + summary["n_pairs"])
                summary["duplicate_pairs"] = int(repeated[pairs].sum())
                summary["contradicting_pairs"] = int(contradicted[pairs].sum())
                reasons = {Reason.DUPLICATE: doubles[pairs], Reason.OVERLAP: overlaps[pairs]}
                masks.append(reasons[Reason.DUPLICATE] | reasons[Reason.OVERLAP])
                if masks[-1].any():
                    part = stats.part(summary["first_pair"], summary["n_pairs"])
                    dropped.add(_count_dropped(request, summary, part, reasons))
    return masks


class _Dropped:
    """Writes the quarantine file of dropped rows, if there are any, as they are found."""

    def __init__(self, tokens: Folder) -> None:
        self._tokens, self._stack = tokens, ExitStack()
        self._file: Any = None

    def __enter__(self) -> "_Dropped":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def add(self, lines: Sequence[str]) -> None:
        """Add a line for each row."""
        if lines and self._file is None:
            path = self._stack.enter_context(self._tokens.replacing(DROPPED))
            self._file = self._stack.enter_context(path.open("w", encoding="utf-8"))
        for line in lines:
            self._file.write(line + "\n")


def _count_dropped(
    request: IngestRequest,
    summary: dict[str, Any],
    stats: PairStats,
    reasons: Mapping[Reason, Any],
) -> list[str]:
    """Count the dropped rows and pairs of a shard; return a quarantine line for each such row.

    A row counts as dropped when it loses its last pair.
    """
    kept = ~np.logical_or.reduce(list(reasons.values()))
    for name, side in (("rows_kept", ~stats.held), ("rows_held_out", stats.held)):
        summary[name] = len(np.unique(stats.rows[kept & side]))
    lost = set(stats.rows.tolist()) - set(stats.rows[kept].tolist())
    details = {
        Reason.DUPLICATE: "repeats an earlier pair",
        Reason.OVERLAP: "its prompt is also in an evaluation set",
    }
    lines = []
    for reason, mask in reasons.items():
        rows = sorted(set(stats.rows[mask].tolist()) & lost)
        lost -= set(rows)
        summary["refused"][str(reason)] = summary["refused"].get(str(reason), 0) + len(rows)
        summary["pairs_left_out"] += int((mask & ~np.isin(stats.rows, rows)).sum())
        path = request.files[summary["source"]]
        entry = {"file": path, "reason": reason, "detail": details[reason], "excerpt": ""}
        lines += [json.dumps(entry | {"row": row + 1}, ensure_ascii=False) for row in rows]
    return lines
