"""Ingest: files of pairs to token shards with Ray Data; on the driver, reading in data tasks.

A data task reads one split of a file and writes its own token shards, named by file and row, so
no token passes through the driver, a shard that is there is not written again, and the order of
shards does not depend on scheduling. The manifest, written last, makes the set exist.
"""

import functools
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from jinja2 import TemplateError

from orpo_ray.orchestration.data_tasks import each
from orpo_ray.orchestration.grouping import group_shards, prompt_keys
from orpo_ray.preference.errors import DataError
from orpo_ray.preference.groups import RowId
from orpo_ray.preference.records import Reason, Refusal, excerpt, normalise
from orpo_ray.preference.shards import Shard, TokenSet, write_shard
from orpo_ray.preference.sources import RawRow, Split, read_split, split_file
from orpo_ray.preference.templates import PairText, render
from orpo_ray.preference.tokenization import PairTokenizer

# Raised whenever the same input would give other tokens or another report.
CODE_VERSION = 4
QUARANTINE, DONE = "quarantine", "done"
_BATCH_ROWS = 256


@dataclass(frozen=True)
class IngestRequest:
    """What decides the tokens, and where they are cached.

    Args:
        files: absolute paths, in order.
        tokenizer: folder or hub id.
        revision: of a hub tokenizer.
        max_length: tokens of prompt plus completion.
        shard_rows: source rows in one token shard.
        cache_directory: parent of the token sets, on storage that every node reaches.
        group_by_prompt: whether pairs of one prompt become one group.
    """

    files: tuple[str, ...]
    tokenizer: str
    revision: str | None
    max_length: int
    shard_rows: int
    cache_directory: str
    group_by_prompt: bool = False


def ingest(request: IngestRequest) -> TokenSet:
    """Tokenize the files, or find them tokenized already.

    Raises:
        DataError: for files that cannot be read, and when every row is refused.
    """
    directory = Path(request.cache_directory) / _cache_key(request)
    found = TokenSet.load(str(directory))
    if found is None:
        for name in (QUARANTINE, DONE):
            (directory / name).mkdir(parents=True, exist_ok=True)
        summaries = _run_tasks(request, str(directory))
        found = _gathered(request, str(directory), summaries)
        found.save()
        shutil.rmtree(directory / DONE)
        for path in directory.glob("*.parquet"):  # shards of pairs that became shards of prompts
            if path.name not in {shard.name for shard in found.shards}:
                path.unlink()
    if not found.n_pairs:
        raise DataError(_nothing_usable(found))
    return found


def _cache_key(request: IngestRequest) -> str:
    """A hash of everything that could change the tokens."""
    tokenizer = load_tokenizer(request.tokenizer, request.revision, request.max_length).tokenizer
    stats = [os.stat(path) for path in request.files]
    parts = [
        CODE_VERSION,
        [
            (path, stat.st_size, stat.st_mtime_ns)
            for path, stat in zip(request.files, stats, strict=True)
        ],
        tokenizer.backend_tokenizer.to_str(),
        [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template],
        [request.max_length, request.shard_rows, request.group_by_prompt],
    ]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, default=str).encode())


@functools.cache
def load_tokenizer(name: str, revision: str | None, max_length: int) -> PairTokenizer:
    """The tokenizer of a folder or hub id, once a process.

    Raises:
        DataError: when it cannot be used for pairs.
    """
    from transformers import AutoTokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a data task has one CPU
    return PairTokenizer(AutoTokenizer.from_pretrained(name, revision=revision), max_length)


def _run_tasks(request: IngestRequest, directory: str) -> list[dict[str, Any]]:
    """Read all files with Ray Data; returns a summary of every shard in source order."""
    numbered = [{"source": i, "path": path} for i, path in enumerate(request.files)]
    splits = each(numbered, _SplitFile(request.shard_rows))
    summaries = each(splits, _TokenizeSplit(request, directory))
    return sorted(summaries, key=lambda summary: (summary["source"], summary["first_row"]))


@dataclass(frozen=True)
class _SplitFile:
    """The data task that cuts one file into splits."""

    rows_per_split: int

    def __call__(self, row: dict[str, str]) -> list[dict[str, str]]:
        item = json.loads(row["item"])
        splits = split_file(item["path"], self.rows_per_split)
        return [
            {"item": json.dumps({"source": item["source"], "split": asdict(split)})}
            for split in splits
        ]


@dataclass(frozen=True)
class _TokenizeSplit:
    """The data task that turns one split into token shards."""

    request: IngestRequest
    directory: str

    def __call__(self, row: dict[str, str]) -> list[dict[str, str]]:
        item = json.loads(row["item"])
        split = Split(**item["split"])
        answers = []
        rows = read_split(split)
        while chunk := list(itertools.islice(rows, self.request.shard_rows)):
            summary = self._write_chunk(item["source"], chunk)
            answers.append({"item": json.dumps(summary)})
        return answers

    def _write_chunk(self, source: int, chunk: Sequence[RawRow]) -> dict[str, Any]:
        """The summary of one shard, which an ingest that was killed may have written already."""
        name = f"{source:05d}-{chunk[0].number:010d}"
        done = Path(self.directory, DONE, f"{name}.json")
        if not done.exists():
            temporary = done.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps(self._tokenize_chunk(name, source, chunk)))
            temporary.replace(done)
        summary: dict[str, Any] = json.loads(done.read_text())
        return summary

    def _tokenize_chunk(self, name: str, source: int, chunk: Sequence[RawRow]) -> dict[str, Any]:
        """Tokenize up to `shard_rows` rows, write what is kept and what is not."""
        request = self.request
        pairs = load_tokenizer(request.tokenizer, request.revision, request.max_length)
        groups, refused, truncated = [], [], 0
        for batch in _batches(chunk, _BATCH_ROWS):
            kept: list[tuple[RawRow, PairText]] = []
            for raw in batch:
                text = _text(raw, pairs.tokenizer)
                if isinstance(text, Refusal):
                    refused.append((raw, text))
                else:
                    kept.append((raw, text))
            row_ids = [RowId(source, raw.number) for raw, _ in kept]
            results = pairs.tokenize([text for _, text in kept], row_ids)
            for (raw, _), result in zip(kept, results, strict=True):
                if isinstance(result, Refusal):
                    refused.append((raw, result))
                else:
                    groups.append(result.group)
                    truncated += result.truncated
        shard = None
        if groups:
            shard = asdict(write_shard(f"{self.directory}/{name}.parquet", groups))
        self._write_refused(name, request.files[source], refused)
        return {
            "source": source,
            "first_row": chunk[0].number,
            "shard": shard,
            "prompt_keys": prompt_keys(groups) if request.group_by_prompt else [],
            "quarantine": f"{QUARANTINE}/{name}.jsonl" if refused else None,
            "rows_read": len(chunk),
            "refused": Counter(str(refusal.reason) for _, refusal in refused),
            "truncated_pairs": truncated,
            "longest_group_tokens": max((group.n_tokens for group in groups), default=0),
        }

    def _write_refused(
        self, name: str, path: str, refused: Sequence[tuple[RawRow, Refusal]]
    ) -> None:
        """One line for every row that is not trained on; `row` counts from 1."""
        if not refused:
            return
        lines = [
            json.dumps(
                {
                    "file": path,
                    "row": raw.number + 1,
                    "reason": refusal.reason,
                    "detail": refusal.detail,
                    "excerpt": raw.excerpt[:200] or excerpt(raw.record or {}),
                },
                ensure_ascii=False,
            )
            for raw, refusal in sorted(refused, key=lambda entry: entry[0].number)
        ]
        target = Path(self.directory, QUARANTINE, f"{name}.jsonl")
        temporary = target.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")
        temporary.replace(target)


def _text(raw: RawRow, tokenizer: Any) -> PairText | Refusal:
    """One row as text, or why it is not trained on."""
    if raw.record is None:
        if raw.problem is None:
            raise AssertionError(f"row {raw.number} has neither a record nor a problem")
        return Refusal(raw.problem, "the row cannot be read as one JSON object")
    record = normalise(raw.record)
    if isinstance(record, Refusal):
        return record
    try:
        return render(record, tokenizer)
    except TemplateError as error:  # as templates do for turns that their model does not take
        return Refusal(Reason.TEMPLATE_REFUSED, f"the chat template says: {error}")


def _batches(rows: Sequence[RawRow], size: int) -> Iterator[Sequence[RawRow]]:
    return (rows[first : first + size] for first in range(0, len(rows), size))


def _gathered(
    request: IngestRequest, directory: str, summaries: Sequence[Mapping[str, Any]]
) -> TokenSet:
    """The token set of all shards, with the counts of every source."""
    by_source = {
        path: _counts([s for s in summaries if s["source"] == source])
        for source, path in enumerate(request.files)
    }
    report = _counts(summaries) | {
        "sources": by_source,
        "quarantine": [s["quarantine"] for s in summaries if s["quarantine"]],
    }
    shards = tuple(Shard(**summary["shard"]) for summary in summaries if summary["shard"])
    if request.group_by_prompt:
        shards, longest = group_shards(directory, summaries, request.shard_rows)
        report |= {
            "prompts": sum(shard.n_groups for shard in shards),
            "tokens": sum(shard.n_tokens for shard in shards),
            "longest_group_tokens": longest,
        }
    return TokenSet(directory, shards, request.files, report)


def _counts(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows read, kept and refused by reason; the first is the sum of the others."""
    refused: Counter[str] = Counter()
    for summary in summaries:
        refused.update(summary["refused"])
    shards = [summary["shard"] for summary in summaries if summary["shard"]]
    return {
        "rows_read": sum(summary["rows_read"] for summary in summaries),
        "rows_kept": sum(shard["n_pairs"] for shard in shards),
        "rows_refused": refused.total(),
        "refused": dict(sorted(refused.items())),
        "truncated_pairs": sum(summary["truncated_pairs"] for summary in summaries),
        "tokens": sum(shard["n_tokens"] for shard in shards),
        "longest_group_tokens": int(
            np.max([summary["longest_group_tokens"] for summary in summaries], initial=0)
        ),
    }


def _nothing_usable(tokens: TokenSet) -> list[str]:
    """Why nothing is left: counts by reason, and the first few rows."""
    report = tokens.report
    counts = ", ".join(f"{count} {reason}" for reason, count in report["refused"].items())
    lines = [f"no usable row in {', '.join(tokens.sources)}: {counts or 'the files hold no row'}"]
    for part in report["quarantine"][:1]:
        for line in Path(tokens.directory, part).read_text().splitlines()[:3]:
            row = json.loads(line)
            lines.append(f"{row['file']}:{row['row']}: {row['reason']}: {row['detail']}")
    return lines
