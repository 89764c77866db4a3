"""Tokenizing one split of a file into token shards and counts; in data tasks."""

import functools
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from orpo_ray.dataset.chunks import QUARANTINE, Chunk, ChunkWriter, write_chunks
from orpo_ray.dataset.pair_index import STATS, PairStatsBuilder
from orpo_ray.dataset.request import IngestRequest
from orpo_ray.preference.errors import DataError
from orpo_ray.preference.groups import RowId
from orpo_ray.preference.reading.readers import read_split, split_file
from orpo_ray.preference.reading.rows import RawRow, Split
from orpo_ray.preference.records import (
    NOTE_TEXTS,
    TEMPLATE_DROPS,
    Note,
    Reason,
    Record,
    Refusal,
    n_characters,
    text_length,
)
from orpo_ray.preference.rendering import TemplateLimitError
from orpo_ray.preference.special_tokens import special_token_in
from orpo_ray.preference.templates import PairText, empty_answer, render
from orpo_ray.preference.tokenization import PairTokenizer, TokenizedPair
from orpo_ray.storage.files import read_json
from orpo_ray.storage.folder import Folder, FolderLike

DONE = "done"
_BATCH_ROWS = 256
_BATCH_CHARACTERS = 4_000_000
_SHARD_TOKENS = 8_000_000
_LEAST_CHARACTERS = 2  # of text a token, on average


def make_folders(tokens: FolderLike) -> None:
    """Create the folders of a token set on this node."""
    for name in (QUARANTINE, DONE, STATS):
        (Folder.at(tokens) / name).make()


def _data_errors_as_items(
    work: Callable[[Any, dict[str, Any]], list[dict[str, Any]]],
) -> Callable[[Any, dict[str, str]], list[dict[str, str]]]:
    """Wrap a data task to read and return JSON, and a `DataError` as an item `problems`.

    So one bad file does not stop the others, and all errors are reported at once.
    """

    @functools.wraps(work)
    def answer(self: Any, row: dict[str, str]) -> list[dict[str, str]]:
        try:
            answers = work(self, json.loads(row["item"]))
        except TemplateLimitError:
            raise  # every other file would take as long
        except DataError as error:
            answers = [{"problems": list(error.lines)}]
        return [{"item": json.dumps(item)} for item in answers]

    return answer


@dataclass(frozen=True)
class SplitFile:
    """Data task that cuts one file into splits."""

    rows_per_split: int

    @_data_errors_as_items
    def __call__(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        """Return one item per split."""
        splits = split_file(item["path"], self.rows_per_split)
        return [{"source": item["source"], "split": asdict(split)} for split in splits]


@dataclass(frozen=True)
class TokenizeSplit:
    """Data task that tokenizes one split, or some small files, into token shards.

    Args:
        request: for the token set.
        tokens: its folder.
        tokenizer: of `request.pickled_tokenizer`.
    """

    request: IngestRequest
    tokens: FolderLike
    tokenizer: bytes | None = field(default=None, repr=False)

    @functools.cached_property
    def _pairs(self) -> PairTokenizer:
        return self.request.pair_tokenizer(self.tokenizer)

    @_data_errors_as_items
    def __call__(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        """Return one summary per shard; an item with problems is passed through."""
        if "problems" in item:
            return [item]
        if "files" in item:
            return self._write_files(item["files"])
        chunks = self._chunks(Split(**item["split"]))
        return [self._write_chunk(item["source"], first, chunk) for first, chunk in chunks]

    def _write_chunk(self, source: int, first: int, chunk: Iterator[RawRow]) -> dict[str, Any]:
        """Write one shard, unless an interrupted ingest already has; return its summary."""
        tokens, done = Folder.at(self.tokens), f"{DONE}/{source:05d}-{first:010d}.json"
        if tokens.fetch_file(done, once=True).exists():
            for _ in chunk:  # the next shard begins after it
                pass
        else:
            make_folders(tokens)
            (summary,) = write_chunks(tokens, [self._tokenized(source, first, chunk)])
            tokens.write_json(done, summary)
        return read_json(tokens.path / done)

    def _write_files(self, files: Sequence[tuple[int, str]]) -> list[dict[str, Any]]:
        """Write the shards of small files together; return their summaries and the problems.

        Args:
            files: index and path of each.
        """
        (first, _), *_, (last, _) = files[0], files[-1]
        tokens, done = Folder.at(self.tokens), f"{DONE}/files-{first:05d}-{last:05d}.json"
        if tokens.fetch_file(done, once=True).exists():
            summaries: list[dict[str, Any]] = read_json(tokens.path / done)["summaries"]
            return summaries
        make_folders(tokens)
        writer = ChunkWriter(tokens, self.request.shard_rows)
        problems: list[str] = []
        for source, path in files:
            try:
                for split in split_file(path, self.request.shard_rows):
                    for number, chunk in self._chunks(split):
                        writer.add(self._tokenized(source, number, chunk))
            except DataError as error:
                problems += error.lines
        writer.flush()
        if problems:
            return [*writer.summaries, {"problems": problems}]
        tokens.write_json(done, {"summaries": writer.summaries})
        return writer.summaries

    def _chunks(self, split: Split) -> Iterator[tuple[int, Iterator[RawRow]]]:
        """The rows of each shard of a split, to be read before the next, and their first number."""
        rows = read_split(split)
        for first in rows:
            yield first.number, self._shard_of(first, rows)

    def _shard_of(self, first: RawRow, rows: Iterator[RawRow]) -> Iterator[RawRow]:
        """Rows up to `shard_rows`, or to what may be `_SHARD_TOKENS` tokens.

        A worker holds some tens of shards, so they bound its memory for rows of any length.
        """
        most = 2 * self.request.limits.max_length
        n_tokens, row = 0, first
        for _ in range(self.request.shard_rows - 1):
            yield row
            n_tokens += min(most, text_length(row.record) // _LEAST_CHARACTERS)
            if n_tokens >= _SHARD_TOKENS or (more := next(rows, None)) is None:
                return
            row = more
        yield row

    def _tokenized(self, source: int, first: int, rows: Iterator[RawRow]) -> Chunk:
        contents = _ShardContents(self.request, source, self._pairs)
        while batch := list(itertools.islice(rows, _BATCH_ROWS)):
            contents.add(batch)
        return Chunk(source, self.request.files[source], first, contents)


@dataclass(frozen=True)
class _RenderedRow:
    """One row after rendering.

    Args:
        raw: the source row.
        texts: its pairs, at least one.
        prompt: `Record.prompt_key` of its pairs.
        left_out: number of its pairs that cannot be trained on.
    """

    raw: RawRow
    texts: tuple[PairText, ...]
    prompt: str
    left_out: int

    @property
    def n_characters(self) -> int:
        """Number of characters to tokenize."""
        return sum(2 * len(t.prompt) + len(t.chosen) + len(t.rejected) for t in self.texts)


class _ShardContents:
    """Collects the kept pairs, refused rows and counts of one shard."""

    def __init__(self, request: IngestRequest, source: int, pairs: PairTokenizer) -> None:
        self._request = request
        self._source = source
        self._pairs = pairs
        self.kept = PairStatsBuilder(request.val_set_size)
        self.refused: list[tuple[RawRow, Refusal]] = []
        self.shapes: Counter[str] = Counter()
        self.notes: dict[str, list[int]] = {}  # number of rows, and the first one
        self.n_read = 0
        self.ignored: set[str] = set()
        self.counts: Counter[str] = Counter(
            pairs_left_out=0, truncated_pairs=0, truncated_prompts=0, truncated_completions=0
        )

    def add(self, batch: Sequence[RawRow]) -> None:
        """Render and tokenize a batch of rows."""
        self.n_read += len(batch)
        rows: list[_RenderedRow] = []
        n_batch = 0
        for raw in batch:
            try:
                found = self._render_row(raw)
            except TemplateLimitError as error:
                place = f"{self._request.files[self._source]}:{raw.number + 1}"
                raise TemplateLimitError([f"{place}: {line}" for line in error.lines]) from None
            except DataError:
                raise
            except Exception as error:  # one odd row must not stop the ingest
                found = Refusal(Reason.UNEXPECTED, f"{type(error).__name__}: {error}")
            if isinstance(found, Refusal):
                self.refused.append((raw, found))
            else:
                rows.append(found)
                n_batch += found.n_characters
            if n_batch > _BATCH_CHARACTERS:
                self._tokenize(rows)
                rows, n_batch = [], 0
        self._tokenize(rows)

    def counts_of_rows(self) -> dict[str, Any]:
        """Counts for the summary of a shard."""
        return {
            "rows_read": self.n_read,
            "refused": Counter(str(refusal.reason) for _, refusal in self.refused),
            **self.counts,
            "shapes": self.shapes,
            "notes": self.notes,
            "ignored_columns": sorted(self.ignored),
        }

    def _tokenize(self, rows: Sequence[_RenderedRow]) -> None:
        """Tokenize and add some rendered rows."""
        row_ids = [RowId(self._source, row.raw.number) for row in rows for _ in row.texts]
        results = iter(self._pairs.tokenize([text for row in rows for text in row.texts], row_ids))
        for row in rows:
            self._add_row(row, list(itertools.islice(results, len(row.texts))))

    def _add_row(self, row: _RenderedRow, results: Sequence[TokenizedPair | Refusal]) -> None:
        """Add the pairs of one row; refuse the row if none of them can be trained on."""
        refused = [result for result in results if isinstance(result, Refusal)]
        if len(refused) == len(results):
            self.refused.append((row.raw, refused[0]))
            return
        self.counts["pairs_left_out"] += row.left_out + len(refused)
        column = self._request.subset_column
        subset = "" if column is None else str((row.raw.record or {}).get(column, ""))
        notes: set[Note] = set()
        for text, pair in zip(row.texts, results, strict=True):
            if isinstance(pair, TokenizedPair):
                notes |= text.notes | ({Note.LOST_CHARACTERS} if pair.has_lost else set())
                self.kept.add(pair.group, text, row.prompt, subset)
                self.counts["truncated_prompts"] += pair.prompt_cut
                self.counts["truncated_completions"] += pair.completion_cut
                self.counts["truncated_pairs"] += pair.prompt_cut or pair.completion_cut

        for note in notes:
            n_rows, first = self.notes.get(note, [0, row.raw.number])
            self.notes[note] = [n_rows + 1, min(first, row.raw.number)]

    def _render_row(self, raw: RawRow) -> _RenderedRow | Refusal:
        """Render the pairs of one row, or refuse it."""
        if raw.record is None:
            if raw.problem is None:
                raise AssertionError(f"row {raw.number} has neither a record nor a problem")
            return Refusal(raw.problem, _WHY_NO_RECORD.get(raw.problem, "not a JSON object"))
        found = self._request.reader.read(raw.record)
        if isinstance(found, Refusal):
            return found
        self.shapes[found.shape.value] += 1
        self.ignored |= found.ignored - {self._request.subset_column}
        texts, refused = [], []
        for record in found.records:
            text = self._render_record(record)
            if isinstance(text, Refusal):
                refused.append(text)
            else:
                texts.append(text)
        if not texts:
            return refused[0]
        # All pairs of one row share its prompt.
        prompt = found.records[0].prompt_key
        return _RenderedRow(raw, tuple(texts), prompt, found.left_out + len(refused))

    def _render_record(self, record: Record) -> PairText | Refusal:
        tokenizer = self._pairs.tokenizer
        if self._request.special_tokens == "refuse":
            refusal = special_token_in(record, tokenizer)
            if refusal:
                return refusal
        most = self._request.limits.characters
        if n_characters(record) > most:
            return _too_large(n_characters(record), most)
        # Twice, as the end of a conversation may be cut.
        text = render(record, tokenizer, self._request.template_date, 2 * most)
        if isinstance(text, Refusal):
            return text
        n_rendered = len(text.prompt) + max(len(text.chosen), len(text.rejected))
        if n_rendered > most:
            return _too_large(n_rendered, most)
        dropped = text.notes & TEMPLATE_DROPS
        if dropped and self._request.template_drops == "refuse":
            return Refusal(Reason.TEMPLATE_DROPS, "; ".join(NOTE_TEXTS[n] for n in sorted(dropped)))
        try:
            (text.prompt + text.chosen + text.rejected).encode()
        except UnicodeEncodeError:
            return Refusal(Reason.BAD_SURROGATE, "the rendered text contains an unpaired surrogate")
        return empty_answer(text, tokenizer) or text


def _too_large(n_characters: int, most: int) -> Refusal:
    return Refusal(
        Reason.TOO_LARGE,
        f"the pair has {n_characters} characters, more than {most}, the limit of a pair (16 for "
        "each token of max_length if that is more than 2,000,000)",
    )


_WHY_NO_RECORD = {
    Reason.MALFORMED_JSON: "the line is not valid JSON",
    Reason.MALFORMED_TABLE: "its number of cells differs from the header's",
    Reason.TORN_LINE: "the last line is not valid JSON and has no newline; is the file cut off?",
    Reason.NOT_UTF8: "not valid UTF-8",
    Reason.TOO_DEEP: "lists and objects within one another, deeper than any row of preference data",
    Reason.DUPLICATE_KEY: "an object has a duplicate key, whose value depends on the parser",
}
