"""Tables of scores, a row a pair: the rows' places, their subsets, and two tables side by side."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.dataset.pair_index import iter_columns
from orpo_ray.dataset.shards import TokenSet
from orpo_ray.preference.errors import DataError
from orpo_ray.storage.files import first_line, read_json

RESULT = "evaluation.json"
_log = logging.getLogger(__name__)


def with_places(scores: pa.Table, tokens: TokenSet, config: ORPOConfig) -> pa.Table:
    """File, row from 1, and subset in place of the index of the source."""
    source, row = (scores[name].to_numpy() for name in ("source", "row"))
    codes, names = np.zeros(len(row), np.int32), [""]
    if config.data.eval_subset_column:
        codes, names = _subsets(tokens, _place(source, row))
    columns: Mapping[str, Any] = {
        "file": _dictionary(source, tokens.sources),
        "row": pa.array(row + 1, pa.int64()),
        "subset": _dictionary(codes, names),
    }
    rest = scores.drop_columns(["source", "row"])
    return pa.table({**columns, **{name: rest[name] for name in rest.column_names}})


def _dictionary(codes: Any, names: Sequence[str]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array(names, pa.string()))


def _place(source: Any, row: Any) -> Any:
    """Source and row as one number, which orders them."""
    return (source.astype(np.int64) << 40) + row


def _subsets(tokens: TokenSet, places: Any) -> tuple[Any, list[str]]:
    """For each place the index of its subset, and the names of those; "" is the first."""
    order = np.argsort(places, kind="stable")
    ordered = places[order]
    found, names = np.zeros(len(places), np.int32), {"": 0}
    for source, row, subset in iter_columns(tokens.folder, "sources", "rows", "subsets"):
        known = _place(source, row)  # in order, as the files of stats are
        if not len(known):
            continue
        values, which = np.unique(subset, return_inverse=True)
        codes = np.array([names.setdefault(name, len(names)) for name in values.tolist()])
        low, high = np.searchsorted(ordered, [known[0], known[-1] + 1])
        at = np.minimum(np.searchsorted(known, ordered[low:high]), len(known) - 1)
        same = known[at] == ordered[low:high]
        found[order[low:high][same]] = codes[which.reshape(-1)[at[same]]]
    return found, list(names)


def paired(name: str, table: pa.Table, baseline: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The scores of the rows of which both models score as many pairs, in the same order.

    With another tokenizer the baseline may have lost other pairs, and its keys of prompts are
    hashes of other tokens: its pairs get the keys of the model's pairs of the same row.
    """
    files: dict[str, int] = {}
    places = [_places_of(part, files) for part in (table, baseline)]
    (ours, n_ours), (theirs, n_theirs) = (np.unique(p, return_counts=True) for p in places)
    both, mine, other = np.intersect1d(ours, theirs, assume_unique=True, return_indices=True)
    both = both[n_ours[mine] == n_theirs[other]]
    n_left_out = len(table) + len(baseline)
    table, baseline = (
        part.filter(pa.array(np.isin(found, both)))
        for part, found in zip((table, baseline), places, strict=True)
    )
    n_left_out -= 2 * len(table)
    if n_left_out:
        _log.warning(
            "%s data: %d pairs that only one of the two tokenizers takes are left out of the "
            "comparison, which is on %d",
            *(name, n_left_out, len(table)),
        )
    index = baseline.column_names.index("prompt_key")
    return table, baseline.set_column(index, "prompt_key", table["prompt_key"])


def _places_of(table: pa.Table, files: dict[str, int]) -> Any:
    """The place of each row by the numbers of files, to which unknown ones are added."""
    codes, names = codes_of(table, "file")
    numbers = np.array([files.setdefault(name, len(files)) for name in names], np.int64)
    return _place(numbers[codes], table["row"].to_numpy())


def finished_evaluation(name: str) -> Path | None:
    """The folder of a finished evaluation, named by itself or its `evaluation.json`, else None."""
    path = Path(name).expanduser()
    folder = path.parent if path.name == RESULT else path
    is_model = any((folder / kind).is_file() for kind in ("config.json", "adapter_config.json"))
    return folder.resolve() if (folder / RESULT).is_file() and not is_model else None


def read_finished(folder: Path) -> dict[str, pa.Table]:
    """The scores of a finished evaluation, by what its sets are called in results.

    Raises:
        DataError: for an evaluation without its scores.
    """
    try:
        sets = read_json(folder / RESULT)["sets"]
        # Beside the result, wherever both were when it was written.
        return {
            name: pq.read_table(folder / part["scores"].rpartition("/")[2])
            for name, part in sets.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"baseline: {folder}: no evaluation with its scores: {first_line(error)}"
        raise DataError([problem]) from error


def why_not_comparable(table: pa.Table, baseline: pa.Table) -> str | None:
    """Why scores cannot be compared with those of a finished evaluation; None where they can.

    With another tokenizer all prompts have other keys; where only some have, rows were changed.
    """
    files: dict[str, int] = {}
    places = [_places_of(part, files) for part in (table, baseline)]
    (ours, mine), (theirs, other) = (np.unique(found, return_index=True) for found in places)
    _, first, second = np.intersect1d(ours, theirs, assume_unique=True, return_indices=True)
    keys = [part["prompt_key"].to_numpy() for part in (table, baseline)]
    same = keys[0][mine[first]] == keys[1][other[second]]
    if not len(same):
        return "it has no row of these files"
    if same.any() and not same.all():
        n_changed = len(same) - int(same.sum())
        return f"{n_changed} of {len(same)} rows have another prompt now; evaluate it again"
    return None


def codes_of(table: pa.Table, name: str) -> tuple[Any, list[str]]:
    """Indices and values of a column of text."""
    column = table[name].combine_chunks().dictionary_encode()
    return column.indices.to_numpy(), column.dictionary.to_pylist()
