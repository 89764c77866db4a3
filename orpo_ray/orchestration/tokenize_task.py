"""Tokenizing one split of a file: rows in, token shards and counts out; in data tasks."""

import functools
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from orpo_ray.orchestration.pair_stats import StatsOfPairs
from orpo_ray.preference.errors import DataError
from orpo_ray.preference.groups import RowId
from orpo_ray.preference.readers import RawRow, Split, read_split, split_file
from orpo_ray.preference.records import Reason, Record, Refusal, excerpt
from orpo_ray.preference.shapes import RowReader
from orpo_ray.preference.shards import write_shard
from orpo_ray.preference.templates import PairText, empty_answer, render, special_token_in
from orpo_ray.preference.tokenization import Limits, PairTokenizer, TokenizedPair

QUARANTINE, DONE = "quarantine", "done"
_BATCH_ROWS = 256


@dataclass(frozen=True)
class IngestRequest:
    """What decides the tokens, and where they are cached.

    Args:
        files: absolute paths or URLs, in order.
        tokenizer: folder or hub id.
        revision: of a hub tokenizer.
        limits: of the lengths of a pair.
        shard_rows: source rows in one token shard.
        cache_directory: parent of the token sets, on storage that every node reaches.
        reader: finds the pairs of a row.
        chat_template: the text of one, instead of the tokenizer's.
        special_tokens: whether texts may hold special tokens, `refuse` or `allow`.
        group_by_prompt: whether pairs of one prompt become one group.
        val_set_size: share of the prompts whose pairs are held out.
        drop_duplicates: whether a pair that occurred before is left out.
        other_sets: directories of token sets whose prompts are left out.
        subset_column: column that says which part of an evaluation set a row belongs to.
    """

    files: tuple[str, ...]
    tokenizer: str
    revision: str | None
    limits: Limits
    shard_rows: int
    cache_directory: str
    reader: RowReader = field(default_factory=RowReader)
    chat_template: str | None = None
    special_tokens: str = "refuse"
    group_by_prompt: bool = False
    val_set_size: float = 0.0
    drop_duplicates: bool = False
    other_sets: tuple[str, ...] = ()
    subset_column: str | None = None

    def pair_tokenizer(self) -> PairTokenizer:
        """The tokenizer with its limits, loaded once a process as long as its files stay."""
        folder = Path(self.tokenizer)
        stats = [path.stat() for path in sorted(folder.iterdir())] if folder.is_dir() else []
        files = tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)
        return _load_tokenizer(
            self.tokenizer, self.revision, self.chat_template, self.limits, files
        )


@functools.lru_cache(maxsize=8)
def _load_tokenizer(
    name: str,
    revision: str | None,
    chat_template: str | None,
    limits: Limits,
    files: tuple[tuple[int, int], ...],
) -> PairTokenizer:
    """The tokenizer of a folder or hub id.

    Raises:
        DataError: when it cannot be used for pairs.
    """
    from transformers import AutoTokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a data task has one CPU
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return PairTokenizer(tokenizer, limits)


def _problems_as_answers(
    work: Callable[[Any, dict[str, Any]], list[dict[str, Any]]],
) -> Callable[[Any, dict[str, str]], list[dict[str, str]]]:
    """Take and give JSON; a file's problem is an answer too, so that all of them can be said."""

    @functools.wraps(work)
    def answer(self: Any, row: dict[str, str]) -> list[dict[str, str]]:
        try:
            answers = work(self, json.loads(row["item"]))
        except DataError as error:
            answers = [{"problems": list(error.lines)}]
        return [{"item": json.dumps(item)} for item in answers]

    return answer


@dataclass(frozen=True)
class SplitFile:
    """The data task that cuts one file into splits."""

    rows_per_split: int

    @_problems_as_answers
    def __call__(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        """One item a split."""
        splits = split_file(item["path"], self.rows_per_split)
        return [{"source": item["source"], "split": asdict(split)} for split in splits]


@dataclass(frozen=True)
class TokenizeSplit:
    """The data task that turns one split into token shards."""

    request: IngestRequest
    directory: str

    @_problems_as_answers
    def __call__(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        """One summary a shard."""
        if "problems" in item:
            return [item]
        rows = read_split(Split(**item["split"]))
        answers = []
        while chunk := list(itertools.islice(rows, self.request.shard_rows)):
            answers.append(self._write_chunk(item["source"], chunk))
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
        rows = _Rows(self.request, source)
        for first in range(0, len(chunk), _BATCH_ROWS):
            rows.add(chunk[first : first + _BATCH_ROWS])
        parts = {"": rows.kept.part(held=False), ".held": rows.kept.part(held=True)}
        shards = {
            part: asdict(write_shard(f"{self.directory}/{name}{part}.parquet", groups, source))
            for part, groups in parts.items()
            if groups
        }
        rows.kept.arrays().save(self.directory, name)
        self._write_refused(name, self.request.files[source], rows.refused)
        kept_rows = [{g.row_ids[0].row for g in groups} for groups in parts.values()]
        return {
            "source": source,
            "first_row": chunk[0].number,
            "name": name,
            "shard": shards.get(""),
            "held_shard": shards.get(".held"),
            "quarantine": f"{QUARANTINE}/{name}.jsonl" if rows.refused else None,
            "rows_read": len(chunk),
            "rows_kept": len(kept_rows[0]),
            "rows_held_out": len(kept_rows[1]),
            "refused": Counter(str(refusal.reason) for _, refusal in rows.refused),
            "longest_group_tokens": max((group.n_tokens for group in parts[""]), default=0),
            **rows.counts,
            "shapes": rows.shapes,
            "ignored_columns": sorted(rows.ignored),
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


class _Rows:
    """What the rows of one shard came to."""

    def __init__(self, request: IngestRequest, source: int) -> None:
        self._request = request
        self._source = source
        self._pairs = request.pair_tokenizer()
        self.kept = StatsOfPairs(request.val_set_size)
        self._identities: dict[int, str] = {}
        self.refused: list[tuple[RawRow, Refusal]] = []
        self.shapes: Counter[str] = Counter()
        self.ignored: set[str] = set()
        self.counts: Counter[str] = Counter(
            pairs_left_out=0, truncated_pairs=0, truncated_prompts=0, truncated_completions=0
        )

    def add(self, batch: Sequence[RawRow]) -> None:
        """Tokenize some rows, a pair or more each."""
        texts: list[PairText] = []
        owners: list[RawRow] = []
        for raw in batch:
            try:
                found = self._texts(raw)
            except DataError:
                raise
            except Exception as error:  # whatever a row holds, it costs no more than itself
                found = Refusal(Reason.UNEXPECTED, f"{type(error).__name__}: {error}")
            if isinstance(found, Refusal):
                self.refused.append((raw, found))
            else:
                texts += found
                owners += [raw] * len(found)
        row_ids = [RowId(self._source, raw.number) for raw in owners]
        pairs = zip(owners, texts, self._pairs.tokenize(texts, row_ids), strict=True)
        for _, part in itertools.groupby(pairs, key=lambda entry: entry[0].number):
            self._take(list(part))
        self._identities.clear()

    def _take(self, results: list[tuple[RawRow, PairText, TokenizedPair | Refusal]]) -> None:
        """One row's pairs: it is refused when none of them can be trained on."""
        refused = [(raw, pair) for raw, _, pair in results if isinstance(pair, Refusal)]
        if len(refused) == len(results):
            self.refused.append(refused[0])
            return
        self.counts["pairs_left_out"] += len(refused)
        for raw, text, pair in results:
            if isinstance(pair, TokenizedPair):
                self.kept.add(pair.group, text, self._identities[raw.number], self._subset(raw))
                self.counts["truncated_prompts"] += pair.prompt_cut
                self.counts["truncated_completions"] += pair.completion_cut
                self.counts["truncated_pairs"] += pair.prompt_cut or pair.completion_cut

    def _subset(self, raw: RawRow) -> str:
        column = self._request.subset_column
        return "" if column is None else str((raw.record or {}).get(column, ""))

    def _texts(self, raw: RawRow) -> list[PairText] | Refusal:
        """One row as text, or why it is not trained on."""
        if raw.record is None:
            if raw.problem is None:
                raise AssertionError(f"row {raw.number} has neither a record nor a problem")
            return Refusal(raw.problem, _WHY_NO_RECORD.get(raw.problem, "it is no JSON object"))
        found = self._request.reader.read(raw.record)
        if isinstance(found, Refusal):
            return found
        self.shapes[found.shape.value] += 1
        self.ignored |= found.ignored - {self._request.subset_column}
        # All pairs of a ranking have one prompt, or stand in one row without any.
        self._identities[raw.number] = found.records[0].identity
        texts, refused = [], []
        for record in found.records:
            token = None
            if self._request.special_tokens == "refuse":
                token = special_token_in(record, self._pairs.tokenizer)
            text = token or self._rendered(record)
            if isinstance(text, Refusal):
                refused.append(text)
            else:
                texts.append(text)
        if not texts:
            return refused[0]
        self.counts["pairs_left_out"] += found.left_out + len(refused)
        return texts

    def _rendered(self, record: Record) -> PairText | Refusal:
        text = render(record, self._pairs.tokenizer)
        if isinstance(text, Refusal):
            return text
        try:
            (text.prompt + text.chosen + text.rejected).encode()
        except UnicodeEncodeError:
            return Refusal(Reason.BAD_SURROGATE, "its text holds half of a surrogate pair")
        return empty_answer(text, self._pairs.tokenizer.eos_token) or text


_WHY_NO_RECORD = {
    Reason.MALFORMED_JSON: "the line is no JSON",
    Reason.MALFORMED_TABLE: "it has not as many cells as the header",
    Reason.TORN_LINE: "the last line of the file has no end: was it cut off?",
    Reason.NOT_UTF8: "it is not UTF-8",
    Reason.DUPLICATE_KEY: "an object has a key twice, and parsers differ in which they keep",
}


def file_items(files: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What `SplitFile` takes, one a file."""
    return ({"source": source, "path": path} for source, path in enumerate(files))
