"""Tables of scores, a row a pair: the rows' places, their subsets, and two tables side by side."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.dataset.pair_index import iter_columns
from orpo_ray.dataset.shards import TokenSet

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


def codes_of(table: pa.Table, name: str) -> tuple[Any, list[str]]:
    """Indices and values of a column of text."""
    column = table[name].combine_chunks().dictionary_encode()
    return column.indices.to_numpy(), column.dictionary.to_pylist()
