"""Token shards (Parquet files of prompt groups) and their manifest; on the driver and workers."""

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from orpo_ray.preference.errors import DataError
from orpo_ray.preference.groups import PromptGroup, RowId
from orpo_ray.storage.files import replacing
from orpo_ray.storage.folder import Folder, FolderLike

_IDS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    [
        ("prompt", _IDS),
        ("completions", pa.list_(_IDS)),
        ("chosen", _IDS),
        ("rejected", _IDS),
        ("source", _IDS),
        ("row", pa.list_(pa.int64())),
    ]
)
MANIFEST_NAME = "manifest.json"
# Increased whenever the files of a token set are laid out in another way.
FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """One token shard: its file and what that contains.

    Args:
        name: file name in the token set's directory; those of small source files are in one file.
        n_groups: number of prompt groups.
        n_pairs: number of pairs.
        n_tokens: number of packed tokens: every prompt and distinct completion of a group once.
        digest: XXH3-128 of tokens, pairs and row ids, independent of the file's encoding.
        source: index of the source file of all pairs, or -1 if they come from several.
        first_group: index of its first group in the file.
    """

    name: str
    n_groups: int
    n_pairs: int
    n_tokens: int
    digest: str
    source: int = -1
    first_group: int = 0

    def fields(self) -> dict[str, Any]:
        """Its fields as JSON, without a `first_group` of 0."""
        fields = dict(vars(self))  # `asdict` would copy each value, which takes long
        if not self.first_group:
            del fields["first_group"]
        return fields


@dataclass(frozen=True)
class TokenSet:
    """A directory of token shards in a fixed order, complete once its manifest exists.

    Args:
        folder: the folder of its files.
        shards: token shards in the order of the source rows.
        sources: source files; `RowId.source` is an index into them.
        report: counts of the ingest, written to `data_report.json`.
        held_out: shards of pairs held out for evaluation, in the same order.
        is_held_out: whether `shards` are those that are held out of the training files; the folder
            and the report are then those of the training set.
    """

    folder: Folder
    shards: tuple[Shard, ...]
    sources: tuple[str, ...]
    report: dict[str, Any]
    held_out: tuple[Shard, ...] = ()
    is_held_out: bool = False

    @property
    def n_groups(self) -> int:
        """Number of prompt groups in all shards, without those held out."""
        return sum(shard.n_groups for shard in self.shards)

    @property
    def n_pairs(self) -> int:
        """Number of pairs in all shards, without those held out."""
        return sum(shard.n_pairs for shard in self.shards)

    @property
    def digest(self) -> str:
        """XXH3-128 over the shards: equal if the same pairs come in the same order and shards."""
        return xxhash.xxh3_128_hexdigest("".join(s.digest for s in self.shards).encode())

    def save(self) -> None:
        """Write the manifest atomically, which commits the token set: call it last."""
        content = {
            "format": FORMAT,
            "directory": str(self.folder.path),
            "shards": [shard.fields() for shard in self.shards],
            "sources": self.sources,
            "report": self.report,
            "held_out": [shard.fields() for shard in self.held_out],
        }
        # Without indentation, which Python's encoder in C does not know.
        self.folder.write_text(MANIFEST_NAME, json.dumps(content))

    @staticmethod
    def load(place: FolderLike) -> "TokenSet | None":
        """Read the token set in `directory`; None if it has not been committed.

        Raises:
            DataError: for a manifest that is damaged, or of a format that this version cannot read.
        """
        folder = Folder.at(place)
        name = f"{folder}/{MANIFEST_NAME}"
        try:
            fields = folder.read_json(MANIFEST_NAME)
        except ValueError as error:
            raise DataError(
                [f"{name} is damaged: delete the folder, which is made again"]
            ) from error
        if not fields:
            return None
        # One without a format was written before formats had numbers, and is of the first.
        if fields.get("format", FORMAT) != FORMAT:
            raise DataError(
                [
                    f"{name} is of format {fields['format']}, and this version of orpo_ray reads "
                    f"{FORMAT}: set another token_cache_dir, or delete the folder"
                ]
            )
        return TokenSet(
            folder=folder,
            shards=tuple(Shard(**shard) for shard in fields["shards"]),
            sources=tuple(fields["sources"]),
            report=fields["report"],
            held_out=tuple(Shard(**shard) for shard in fields["held_out"]),
        )

    def groups(self, shard: Shard) -> list[PromptGroup]:
        """All prompt groups of one of its shards, in file order."""
        return to_groups(self.table(shard.name).slice(shard.first_group, shard.n_groups))

    def table(self, name: str) -> pa.Table:
        """The Parquet file of one shard or of several."""
        return read_table(str(self.folder.fetch_file(name, once=True)))


def write_shard(path: str, groups: Sequence[PromptGroup], source: int = -1) -> Shard:
    """Write groups to one Parquet file atomically; return its description."""
    return write_shards(path, [(source, groups)])[0]


def write_shards(path: str, parts: Sequence[tuple[int, Sequence[PromptGroup]]]) -> list[Shard]:
    """Write several shards, each with the `source` of its groups, to one file atomically."""
    groups = [group for _, part in parts for group in part]
    columns = {
        "prompt": [group.prompt for group in groups],
        "completions": [list(group.completions) for group in groups],
        "chosen": [[chosen for chosen, _ in group.pairs] for group in groups],
        "rejected": [[rejected for _, rejected in group.pairs] for group in groups],
        "source": [[row_id.source for row_id in group.row_ids] for group in groups],
        "row": [[row_id.row for row_id in group.row_ids] for group in groups],
    }
    with replacing(Path(path)) as temporary:
        pq.write_table(pa.table(columns, schema=SCHEMA), temporary, compression="zstd")
    firsts = itertools.accumulate((len(part) for _, part in parts), initial=0)
    return [
        Shard(
            name=os.path.basename(path),
            n_groups=len(part),
            n_pairs=sum(len(group.pairs) for group in part),
            n_tokens=sum(group.n_tokens for group in part),
            digest=_digest(part),
            source=source,
            first_group=first,
        )
        for first, (source, part) in zip(firsts, parts, strict=False)
    ]


def _digest(groups: Sequence[PromptGroup]) -> str:
    """XXH3-128 of lengths, row ids, pairs and token ids; lengths make the encoding unambiguous."""
    digest = xxhash.xxh3_128()
    for group in groups:
        rows = [number for row_id in group.row_ids for number in (row_id.source, row_id.row)]
        lengths = [len(ids) for ids in (group.prompt, *group.completions)]
        digest.update(np.array([*lengths, *rows], dtype=np.int64).tobytes())
        digest.update(np.array(group.pairs, dtype=np.int32).tobytes())
        for ids in (group.prompt, *group.completions):
            digest.update(np.ascontiguousarray(ids, dtype=np.int32).tobytes())
    return digest.hexdigest()


def read_shard(path: str) -> list[PromptGroup]:
    """Read all prompt groups of one file, in order."""
    return to_groups(read_table(path))


def read_table(path: str) -> pa.Table:
    """Read a file of shards as a table whose columns have one chunk."""
    return pq.read_table(path, schema=SCHEMA).combine_chunks()


def to_groups(table: pa.Table) -> list[PromptGroup]:
    """The prompt groups of a table of `read_table`, or of a slice of it."""
    prompts = _list_column(table, "prompt")
    outer = _values_offsets(table, "completions")
    flat = _values(table, "completions")[outer[0] : outer[-1]]
    inner = _split(flat.values.to_numpy(), flat.offsets.to_numpy())
    completions = [tuple(inner[a:b]) for a, b in pairwise(outer - outer[0])]
    pairs = zip(*(_list_column(table, name) for name in ("chosen", "rejected")), strict=True)
    rows = zip(*(_list_column(table, name) for name in ("source", "row")), strict=True)
    return [
        PromptGroup(
            prompt=prompt,
            completions=group_completions,
            pairs=tuple(zip(chosen.tolist(), rejected.tolist(), strict=True)),
            row_ids=tuple(map(RowId, source.tolist(), row.tolist())),
        )
        for prompt, group_completions, (chosen, rejected), (source, row) in zip(
            prompts, completions, pairs, rows, strict=True
        )
    ]


def _values(table: pa.Table, name: str) -> Any:
    """Child array of a list column that has one chunk."""
    return table.column(name).chunk(0).values


def _values_offsets(table: pa.Table, name: str) -> Any:
    """Offsets of a list column that has one chunk."""
    return table.column(name).chunk(0).offsets.to_numpy()


def _split(values: Any, offsets: Any) -> list[Any]:
    """Split a flat array at list offsets, without copying."""
    return [values[a:b] for a, b in pairwise(offsets)]


def _list_column(table: pa.Table, name: str) -> list[np.ndarray[Any, Any]]:
    """Convert a list column that has one chunk to one array per row."""
    return _split(_values(table, name).to_numpy(), _values_offsets(table, name))
