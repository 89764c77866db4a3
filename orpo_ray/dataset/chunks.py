"""Writing tokenized rows as token shards, with their stats and refused rows; in data tasks.

A chunk is what becomes one token shard: rows of one file that follow one another, at most
`shard_rows`. Chunks of small files are written together, into one file of each kind: opening and
closing files would take most of the time otherwise, here and in training.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from orpo_ray.dataset.pair_index import PairStats, PairStatsBuilder
from orpo_ray.dataset.shards import write_shards
from orpo_ray.preference.groups import PromptGroup
from orpo_ray.preference.reading.rows import RawRow
from orpo_ray.preference.records import Refusal, excerpt
from orpo_ray.storage.folder import Folder

QUARANTINE = "quarantine"
_PARTS = {"shard": "", "held_shard": ".held"}


class Contents(Protocol):
    """What came of the rows of a chunk."""

    kept: PairStatsBuilder
    refused: list[tuple[RawRow, Refusal]]

    def counts_of_rows(self) -> dict[str, Any]:
        """Counts for its summary."""


@dataclass(frozen=True)
class Chunk:
    """The rows of one token shard.

    Args:
        source: index of their file.
        path: of the file.
        first_row: number of the first of them, from 0.
        contents: the pairs, refused rows and counts.
    """

    source: int
    path: str
    first_row: int
    contents: Contents

    @property
    def name(self) -> str:
        """Name of its files, without suffix."""
        return f"{self.source:05d}-{self.first_row:010d}"


class ChunkWriter:
    """Writes chunks together as long as they have no more than `shard_rows` pairs and refused rows.

    Args:
        tokens: folder of the token set.
        shard_rows: see `IngestRequest`.
    """

    def __init__(self, tokens: Folder, shard_rows: int) -> None:
        self._tokens, self._shard_rows = tokens, shard_rows
        self._waiting: list[Chunk] = []
        self._n_waiting = 0
        self.summaries: list[dict[str, Any]] = []

    def add(self, chunk: Chunk) -> None:
        """Add the next chunk."""
        n_rows = len(chunk.contents.kept.groups) + len(chunk.contents.refused)
        if self._n_waiting + n_rows > self._shard_rows:
            self.flush()
        self._waiting.append(chunk)
        self._n_waiting += n_rows

    def flush(self) -> None:
        """Write what waits for it."""
        if self._waiting:
            self.summaries += write_chunks(self._tokens, self._waiting)
        self._waiting, self._n_waiting = [], 0


def write_chunks(tokens: Folder, chunks: Sequence[Chunk]) -> list[dict[str, Any]]:
    """Write shards, stats and refused rows of some chunks into one file each.

    Returns:
        A summary for each chunk.
    """
    name = chunks[0].name
    parts = {
        part: [(chunk, chunk.contents.kept.part(held=part == "held_shard")) for chunk in chunks]
        for part in _PARTS
    }
    shards = {part: _write_part(tokens, name + _PARTS[part], parts[part]) for part in _PARTS}
    tokens.publish(*sorted({s["name"] for part in shards.values() for s in part if s}))
    stats = [chunk.contents.kept.arrays() for chunk in chunks]
    PairStats.together(stats).save(tokens, name)
    quarantine = _write_refused(tokens, name, chunks)
    firsts = np.cumsum([0, *(len(part.rows) for part in stats)]).tolist()
    summaries = []
    for index, chunk in enumerate(chunks):
        groups, held = (parts[part][index][1] for part in _PARTS)
        summary = {
            "source": chunk.source,
            "first_row": chunk.first_row,
            "name": name,
            "first_pair": firsts[index],
            "n_pairs": len(stats[index].rows),
            "shard": shards["shard"][index],
            "held_shard": shards["held_shard"][index],
            "quarantine": quarantine if chunk.contents.refused else None,
            "rows_kept": len({group.row_ids[0].row for group in groups}),
            "rows_held_out": len({group.row_ids[0].row for group in held}),
            "longest_group_tokens": max((group.n_tokens for group in groups), default=0),
            "largest_token": _largest_token(chunk.contents.kept.groups),
        }
        summaries.append(summary | chunk.contents.counts_of_rows())
    return summaries


def _write_part(
    tokens: Folder, name: str, parts: Sequence[tuple[Chunk, list[PromptGroup]]]
) -> list[dict[str, Any] | None]:
    """The fields of the shard of each chunk; None for a chunk without groups."""
    some = [(chunk.source, groups) for chunk, groups in parts if groups]
    if not some:
        return [None] * len(parts)
    shards = iter(write_shards(f"{tokens.path}/{name}.parquet", some))
    return [next(shards).fields() if groups else None for _, groups in parts]


def _write_refused(tokens: Folder, name: str, chunks: Sequence[Chunk]) -> str | None:
    """Write the quarantine file, a line for each refused row; `row` counts from 1."""
    lines = [line for chunk in chunks for line in _refused_lines(chunk)]
    if not lines:
        return None
    text = ("\n".join(lines) + "\n").encode(errors="backslashreplace")
    with tokens.replacing(f"{QUARANTINE}/{name}.jsonl") as target:
        target.write_bytes(text)
    return f"{QUARANTINE}/{name}.jsonl"


def _refused_lines(chunk: Chunk) -> Iterator[str]:
    for raw, refusal in sorted(chunk.contents.refused, key=lambda entry: entry[0].number):
        yield json.dumps(
            {
                "file": chunk.path,
                "row": raw.number + 1,
                "reason": refusal.reason,
                "detail": refusal.detail,
                "excerpt": raw.excerpt[:200] or excerpt(raw.record or {}),
            },
            ensure_ascii=False,
        )


def _largest_token(pairs: Sequence[PromptGroup]) -> tuple[int, int]:
    """The largest token id of some pairs, and the first row with it, from 1."""
    if not pairs:
        return 0, 0
    parts = [part for pair in pairs for part in (pair.prompt, *pair.completions)]
    every = np.concatenate(parts)
    place = int(every.argmax())
    ends = np.cumsum([pair.n_tokens for pair in pairs])
    pair = pairs[int(np.searchsorted(ends, place, side="right"))]
    return int(every[place]), pair.row_ids[0].row + 1
