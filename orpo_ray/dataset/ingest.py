"""Ingest: turning source files into a token set; on the driver, which starts data tasks.

A data task reads one split of a file and writes its token shards itself, named by file and row. So
no token passes through the driver, a restarted ingest skips shards that exist, and the order of
shards does not depend on scheduling. The manifest, written last, commits the token set.
"""

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import xxhash

from orpo_ray.dataset.duplicates import DROPPED, find_dropped_pairs
from orpo_ray.dataset.pair_index import STATS, iter_columns, iter_stats
from orpo_ray.dataset.regroup import rewrite_part
from orpo_ray.dataset.request import IngestRequest, MapTasks
from orpo_ray.dataset.shards import Shard, TokenSet
from orpo_ray.dataset.tokenize import DONE, SplitFile, TokenizeSplit, make_folders
from orpo_ray.preference.errors import DataError
from orpo_ray.preference.reading.sources import file_fingerprint
from orpo_ray.preference.records import Reason
from orpo_ray.preference.templates import uses_clock
from orpo_ray.storage.files import locked, one_line
from orpo_ray.storage.folder import Folder

_log = logging.getLogger(__name__)
# Part of the cache key; increased whenever the same input would give other tokens or reports.
CODE_VERSION = 8
LENGTHS = "lengths.npz"
# Files of at most so many bytes are small: a task reads several of them, of so many bytes together.
_SMALL_BYTES, _TASK_BYTES, _TASK_FILES = 1 << 20, 4 << 20, 1024
SHOWN_FILES = 100
"""Files whose counts are in reports, one by one."""
_SHOWN_SOURCES, _REQUESTS = 5, 16
_LOCK = ".lock"
_COUNTS = (
    *("rows_read", "rows_kept", "rows_held_out", "pairs_left_out"),
    *("truncated_pairs", "truncated_prompts", "truncated_completions", "duplicate_pairs"),
    *("contradicting_pairs", "tokens"),
)


def ingest(request: IngestRequest, map_tasks: MapTasks) -> TokenSet:
    """Return the token set of a request, from the cache if it has been tokenized before.

    Args:
        request: files and all settings that determine the tokens.
        map_tasks: runs the data tasks.

    Raises:
        DataError: with one line for each file that cannot be read.
    """
    fingerprints = _fingerprints(request.files)
    tokens = Folder.at(request.cache_directory) / _cache_key(request, fingerprints)
    found = TokenSet.load(tokens)
    if found is not None:
        return found
    try:
        make_folders(tokens)
    except OSError as error:
        problem = f"token_cache_dir: {tokens.parent} cannot be written: {one_line(error)}"
        raise DataError([problem]) from error
    waits = "%s: another command tokenizes these files; waiting for it"
    with locked(tokens.path / _LOCK, lambda: _log.info(waits, some_names(request.files))):
        sizes = [size for size, _ in fingerprints]
        return TokenSet.load(tokens) or _build_and_save(request, tokens, sizes, map_tasks)


def _fingerprints(files: Sequence[str]) -> list[tuple[int | None, Any]]:
    """`file_fingerprint` of each file; those at URLs are asked for at the same time."""
    if not any("://" in path for path in files):
        return [file_fingerprint(path) for path in files]
    with ThreadPoolExecutor(_REQUESTS) as threads:
        return list(threads.map(file_fingerprint, files))


def some_names(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - _SHOWN_SOURCES} more" if len(names) > _SHOWN_SOURCES else ""
    return ", ".join(names[:_SHOWN_SOURCES]) + more


def _build_and_save(
    request: IngestRequest, tokens: Folder, sizes: Sequence[int | None], map_tasks: MapTasks
) -> TokenSet:
    """Build the token set and commit it.

    On another machine, of which a lock may say nothing, a command may build the same set. It makes
    the same files, and removes what is no longer needed when it is done.
    """
    try:
        built = _build_token_set(request, tokens, sizes, map_tasks)
    except Exception:
        found = TokenSet.load(tokens)
        if found is None:
            raise
        return found
    built.save()
    tokens.remove(DONE)
    kept = {shard.name for shard in (*built.shards, *built.held_out)}
    for name in tokens.sizes():
        if name.endswith(".parquet") and name not in kept:  # replaced by a regrouped shard
            tokens.remove(name)
    return built


def _cache_key(request: IngestRequest, fingerprints: Sequence[tuple[int | None, Any]]) -> str:
    """Hash of everything that could change the tokens."""
    tokenizer = request.pair_tokenizer().tokenizer
    settings = dataclasses.asdict(request)
    for name in ("tokenizer", "revision", "cache_directory", "files"):
        del settings[name]
    if not uses_clock(tokenizer):
        del settings["template_date"]
    if not request.reader.takes_one_answer:  # a cache of a version that took two answers only
        del settings["reader"]["takes_one_answer"]
    parts = [
        CODE_VERSION,
        [(path, *found) for path, found in zip(request.files, fingerprints, strict=True)],
        tokenizer.backend_tokenizer.to_str(),
        [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template],
        settings | {"other_sets": [other.name for other in request.other_sets]},
    ]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, default=str).encode())


def _run_tasks(
    request: IngestRequest, tokens: Folder, sizes: Sequence[int | None], map_tasks: MapTasks
) -> list[dict[str, Any]]:
    """Tokenize all files in data tasks; return a summary of each shard, in source order.

    Raises:
        DataError: with one line for each file that cannot be read.
    """
    batches = _batches(request.files, sizes)
    small = [{"files": batch} for batch in batches if len(batch) > 1]
    large = [{"source": batch[0][0], "path": batch[0][1]} for batch in batches if len(batch) == 1]
    splits = map_tasks(large, SplitFile(request.shard_rows)) if large else []
    work = TokenizeSplit(request, tokens, request.pickled_tokenizer())
    answers = map_tasks(small + splits, work)
    problems = [line for answer in answers for line in answer.get("problems", ())]
    if problems:
        raise DataError(sorted(set(problems)))
    return sorted(answers, key=lambda summary: (summary["source"], summary["first_row"]))


def _batches(files: Sequence[str], sizes: Sequence[int | None]) -> list[list[tuple[int, str]]]:
    """Index and path of each file; small files that follow one another are in one batch."""
    batches: list[list[tuple[int, str]]] = []
    n_bytes = _TASK_BYTES + 1
    for source, (path, size) in enumerate(zip(files, sizes, strict=True)):
        is_small = size is not None and size <= _SMALL_BYTES
        n_bytes += size if size is not None and is_small else _TASK_BYTES + 1
        if n_bytes > _TASK_BYTES or len(batches[-1]) == _TASK_FILES:
            batches.append([])
            n_bytes = size if size is not None and is_small else _TASK_BYTES + 1
        batches[-1].append((source, path))
    return batches


def _build_token_set(
    request: IngestRequest, tokens: Folder, sizes: Sequence[int | None], map_tasks: MapTasks
) -> TokenSet:
    """Tokenize, drop and group pairs; return the token set with its report, not yet saved."""
    summaries = _run_tasks(request, tokens, sizes, map_tasks)
    _remove_other_stats(tokens, summaries)
    dropped = find_dropped_pairs(request, tokens, summaries)
    shards = {
        part: tuple(Shard(**s[part]) for s in summaries if s[part])
        for part in ("shard", "held_shard")
    }
    longest: Any = max((s["longest_group_tokens"] for s in summaries), default=0)
    some_dropped = any(mask.any() for mask in dropped)
    if request.group_by_prompt or some_dropped:
        again = partial(rewrite_part, request, tokens, summaries, dropped, map_tasks=map_tasks)
        shards["shard"], longest = again("shard")
        shards["held_shard"], _ = again("held_shard")
    statistics: dict[str, Any] = {"pairs_read": sum(len(mask) for mask in dropped)}
    statistics |= _length_statistics(tokens, summaries, dropped, request.limits.max_length)
    by_source = _by_source(request.files, summaries)
    pairs = shards["shard"]
    report = _sum_counts(summaries) | {
        "notes": _sum_notes(request, summaries),
        "pairs": sum(shard.n_pairs for shard in pairs),
        "tokens": sum(shard.n_tokens for shard in pairs),
        "longest_group_tokens": longest,
        "largest_token": _largest_token(summaries, request.files),
        **statistics,
        **by_source,
        "quarantine": list(dict.fromkeys(s["quarantine"] for s in summaries if s["quarantine"])),
    }
    if request.group_by_prompt:
        report["prompts"] = sum(shard.n_groups for shard in pairs)
    if some_dropped:
        report["quarantine"].append(DROPPED)
    return TokenSet(tokens, pairs, request.files, report, shards["held_shard"])


def _remove_other_stats(tokens: Folder, summaries: Sequence[Mapping[str, Any]]) -> None:
    """Remove the stats of tasks that were run in another way, as after a crash of some files."""
    used = {f"{summary['name']}.npz" for summary in summaries}
    for name in set((tokens / STATS).sizes()) - used:
        tokens.remove(f"{STATS}/{name}")


def _by_source(
    files: Sequence[str], summaries: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Counts of the first files, as `sources`, and what there is to say of the others."""
    of_source: list[list[Mapping[str, Any]]] = [[] for _ in files]
    for summary in summaries:
        of_source[summary["source"]].append(summary)
    shown = {
        path: _sum_counts(found)
        for path, found in zip(files[:SHOWN_FILES], of_source, strict=False)
    }
    if len(files) <= SHOWN_FILES:
        return {"sources": shown}
    rest = zip(files[SHOWN_FILES:], of_source[SHOWN_FILES:], strict=True)
    empty = [path for path, found in rest if not sum(summary["rows_read"] for summary in found)]
    more = {"files": len(files) - SHOWN_FILES, "empty": len(empty), "first_empty": empty[:3]}
    return {"sources": shown, "more_sources": more}


def _largest_token(
    summaries: Sequence[Mapping[str, Any]], files: Sequence[str]
) -> dict[str, Any] | None:
    """The largest token id of all pairs and a row that has it; None without pairs."""
    found = [(*s["largest_token"], s["source"]) for s in summaries if s["largest_token"][1]]
    if not found:
        return None
    token, row, source = max(found)
    return {"id": token, "file": files[source], "row": row}


def _sum_counts(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum the counts of summaries; rows read = rows kept + held out + refused."""
    refused: Counter[str] = Counter()
    shapes: Counter[str] = Counter()
    ignored: set[str] = set()
    for summary in summaries:
        refused.update({reason: n for reason, n in summary["refused"].items() if n})
        shapes.update(summary["shapes"])
        ignored |= set(summary["ignored_columns"])
    return {
        **{name: sum(summary[name] for summary in summaries) for name in _COUNTS},
        "rows_refused": refused.total(),
        "refused": dict(sorted(refused.items())),
        "shapes": dict(shapes.most_common()),
        "ignored_columns": sorted(ignored),
    }


def _sum_notes(
    request: IngestRequest, summaries: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Number of rows and the first row of every note, summed over shards in order."""
    found: dict[str, dict[str, Any]] = {}
    for summary in summaries:
        for note, (n_rows, first) in summary["notes"].items():
            place = f"{request.files[summary['source']]}:{first + 1}"
            found.setdefault(note, {"rows": 0, "first": place})["rows"] += n_rows
    return dict(sorted(found.items()))


def _length_statistics(
    tokens: Folder,
    summaries: Sequence[dict[str, Any]],
    dropped: Sequence[Any],
    max_length: int,
) -> dict[str, Any]:
    """Write histograms of lengths and count how often the longer answer is the chosen one.

    Also sets `tokens` in each summary, counted as if no pairs shared a prompt.
    """
    names = ("prompt", "chosen", "rejected", "longest")
    tallies = {name: np.zeros(max_length + 1, dtype=np.int64) for name in names}
    longer = equal = 0
    masks = iter(dropped)
    for members, stats in iter_stats(tokens, summaries):
        counts = ~stats.held
        for summary in members:
            pairs = slice(summary["first_pair"], summary["first_pair"] + summary["n_pairs"])
            counts[pairs] &= ~next(masks)
            summary["tokens"] = int(stats.lengths[pairs][counts[pairs]].sum())
        prompt, chosen, rejected = stats.lengths[counts].T
        has_both = rejected > 0
        columns = (prompt, chosen, rejected[has_both], prompt + np.maximum(chosen, rejected))
        for name, column in zip(names, columns, strict=True):
            tallies[name] += np.bincount(column, minlength=max_length + 1)
        longer += int((has_both & (chosen > rejected)).sum())
        equal += int((~has_both | (chosen == rejected)).sum())
    with tokens.replacing(LENGTHS) as path, path.open("wb") as file:
        np.savez(file, allow_pickle=False, **tallies)
    return {"pairs_chosen_longer": longer, "pairs_equally_long": equal}


def held_out_set(train: TokenSet, share: float) -> TokenSet:
    """The pairs of the training files that are not trained on, as a set of their own.

    Args:
        train: the training set.
        share: of the prompts, as it was asked for.

    Raises:
        DataError: where none or all of the prompts are held out.
    """
    n_pairs = n_held = 0
    for (held,) in iter_columns(train.folder, "held"):
        n_pairs, n_held = n_pairs + len(held), n_held + int(held.sum())
    if n_pairs and n_held in (0, n_pairs):
        raise DataError([f"val_set_size: {_why_one_sided(train.folder, n_pairs, n_held, share)}"])
    return dataclasses.replace(train, shards=train.held_out, held_out=(), is_held_out=True)


def _why_one_sided(tokens: Folder, n_pairs: int, n_held: int, share: float) -> str:
    """Why all or none of the pairs are held out, and what to do."""
    prompts = np.empty(0, np.uint64)
    for (keys,) in iter_columns(tokens, "prompt_keys"):
        prompts = np.union1d(prompts, keys)
    if len(prompts) == 1:
        return (
            f"all {n_pairs} pairs have one prompt, and prompts are held out whole: "
            "name eval_files instead"
        )
    what, change = ("all", "lower") if n_held else ("none", "raise")
    return (
        f"{what} of the {len(prompts)} prompts would be held out, as a hash of each decides: "
        f"{change} it from {share}, or name eval_files instead"
    )


def pairs_longer_than(tokens: TokenSet, n_tokens: int) -> tuple[int, int]:
    """Count the pairs whose prompt and longest answer together exceed a length.

    Args:
        tokens: a token set.
        n_tokens: the length.

    Returns:
        How many, and the tokens of the longest pair.
    """
    if tokens.is_held_out:
        tally = np.zeros(1, dtype=np.int64)
        for lengths, held in iter_columns(tokens.folder, "lengths", "held"):
            prompt, chosen, rejected = lengths[held].T
            counts = np.bincount(prompt + np.maximum(chosen, rejected), minlength=len(tally))
            counts[: len(tally)] += tally
            tally = counts
    else:
        with np.load(tokens.folder.fetch_file(LENGTHS, once=True)) as arrays:
            tally = arrays["longest"]
    return int(tally[n_tokens + 1 :].sum()), int(tally.nonzero()[0].max(initial=0))


def nothing_usable(tokens: TokenSet) -> list[str]:
    """Explain why a token set has no pairs: counts by reason and first rows; [] if it has some."""
    if tokens.n_pairs:
        return []
    report = tokens.report
    ends = [(report["rows_held_out"], "held out")] if report["rows_held_out"] else []
    ends += [(count, reason) for reason, count in report["refused"].items()]
    counts = ", ".join(f"{count} {end}" for count, end in ends)
    text = f"no usable row in {some_names(tokens.sources)}: {counts or 'the files contain no rows'}"
    if report["refused"].get(Reason.OVERLAP):
        text += (
            "; drop_overlap leaves out all prompts of the evaluation sets: name other eval_files"
        )
    return [text, *first_refused(tokens, 3)]


def first_refused(
    tokens: TokenSet, n_rows: int, reasons: Container[str] | None = None
) -> list[str]:
    """Describe the first refused rows, one line each; None for `reasons` means any reason."""
    lines: list[str] = []
    for part in tokens.report["quarantine"]:
        with tokens.folder.fetch_file(part, once=True).open(encoding="utf-8") as file:
            for text in file:
                row = json.loads(text)
                if reasons is None or row["reason"] in reasons:
                    lines.append(f"{row['file']}:{row['row']}: {row['reason']}: {row['detail']}")
                if len(lines) == n_rows:
                    return lines
    return lines
