"""`data_report.html`, and its text for the terminal; on the driver."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orpo_ray.config.train import OrpoSection
from orpo_ray.dataset.request import TRAIN
from orpo_ray.dataset.shards import TokenSet
from orpo_ray.reports.data import (
    QUARANTINE,
    Tally,
    length_tallies,
    n_tokens,
    passed_over_line,
    source_label,
)
from orpo_ray.reports.page import make_axes, render, svg_of
from orpo_ray.runs.formatting import format_rows
from orpo_ray.storage.files import write_atomic

PAGE = "data_report.html"
_EXAMPLES, _BINS = 3, 30
_SHOWN_TEXT = 200
_LOOKED_AT_SHARDS, _MOST_OF_NLL = 8, 0.5
_COLUMNS = ("rows_read", "rows_kept", "rows_held_out", "rows_refused", "truncated_pairs", "tokens")
Tokens = npt.NDArray[np.int32]


def budget_lines(counts: Mapping[str, Any]) -> list[str]:
    """Lengths, truncation, repeats, the length bias, and the cost of padding."""
    if not counts.get("pairs"):
        return []
    lines = []
    for kind, spread in counts.get("lengths", {}).items():
        if not spread:  # no row has such a part
            continue
        name = "longer side with its prompt" if kind == "longest" else kind
        lines.append(
            f"{name}: mean {spread['mean']} tokens, median {spread['p50']}, "
            f"95th percentile {spread['p95']}, maximum {spread['max']}"
        )
    if "rows_read" not in counts:
        return lines
    pairs, read = counts["pairs"], counts["pairs_read"]
    lines += [
        f"truncated: {_share(counts['truncated_pairs'], read)} of the pairs "
        f"({counts['truncated_prompts']} prompts, {counts['truncated_completions']} with an "
        "answer cut)",
        f"repeated: {_share(counts['duplicate_pairs'], read)} of the pairs occurred before; "
        f"{_share(counts.get('contradicting_pairs', 0), read)} contradict another pair, whose "
        f"answers are theirs swapped; "
        f"{_share(counts.get('overlapping_pairs', 0), read)} share a prompt with an evaluation "
        "set",
        f"length bias: the chosen answer is the longer one in "
        f"{_share(counts['pairs_chosen_longer'], pairs - counts['pairs_equally_long'])} of the "
        "pairs of unequal answers",
        f"tokens: {counts['tokens']} packed; padded batches would take {counts['padded_tokens']},"
        f" {counts['padded_tokens'] / counts['tokens']:.1f} times as many",
    ]
    return lines


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


def write_data_page(
    run_directory: Path, report: Mapping[str, Any], token_sets: Mapping[str, TokenSet]
) -> Path:
    """Write `data_report.html`.

    Args:
        run_directory: with `quarantine/` in it.
        report: the content of `data_report.json`.
        token_sets: by their name in the feed.

    Returns:
        Its path.
    """
    by_name = {name.rstrip("_"): tokens for name, tokens in token_sets.items()}
    parts = []
    for name, counts in report.items():
        whole = "rows_read" in counts
        passed_over = [passed_over_line(counts)] if counts.get("passed_over") else []
        sources = [
            [source_label(path, part), *(part[c] for c in _COLUMNS)]
            for path, part in counts.get("sources", {}).items()
        ]
        parts.append(
            {
                "name": name,
                "lines": [format_rows(counts), *passed_over, *budget_lines(counts)],
                "sources": sources,
                "n_more": counts.get("more_sources", {}).get("files", 0),
                "svg": _histograms(length_tallies(by_name[name])) if whole else "",
                "refused": _examples(run_directory, name, counts.get("refused", {})),
            }
        )
    page = render(
        "data.html.j2",
        title=run_directory.name,
        parts=parts,
        columns=[column.replace("_", " ") for column in _COLUMNS],
    )
    path = run_directory / PAGE
    write_atomic(path, page)
    return path


def _examples(
    run_directory: Path, name: str, refused: Mapping[str, int]
) -> list[tuple[str, int, list[dict[str, Any]]]]:
    """The first refused rows of every reason, the most frequent reason first."""
    found: dict[str, list[dict[str, Any]]] = {reason: [] for reason in refused}
    path = run_directory / QUARANTINE / f"{name}.jsonl"
    if refused and path.exists():
        with path.open(encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                if len(found[row["reason"]]) < _EXAMPLES:
                    found[row["reason"]].append(row)
    ranked = sorted(refused.items(), key=lambda item: -item[1])
    return [(reason, count, found[reason]) for reason, count in ranked]


def _histograms(tallies: Mapping[str, Tally]) -> str:
    figure, axes = make_axes(3, width=12.0, height=2.8)
    panels = (("prompt",), ("chosen", "rejected"), ("longest",))
    for axis, kinds in zip(axes, panels, strict=True):
        longest = max(int(tallies[kind].nonzero()[0].max(initial=1)) for kind in kinds)
        edges = np.linspace(0, longest + 1, min(_BINS, longest + 1) + 1)
        for kind in kinds:
            lengths = np.arange(len(tallies[kind]))
            counts, _ = np.histogram(lengths, bins=edges, weights=tallies[kind])
            axis.stairs(counts, edges, fill=True, alpha=0.55, label=kind)
        axis.set_xlabel("tokens")
        axis.legend(fontsize=8)
    axes[0].set_ylabel("pairs")
    return svg_of(figure)


def first_pair_lines(tokens: TokenSet, tokenizer: Any, orpo: OrpoSection) -> list[str]:
    """The first pair as the model receives it, and which parts are trained."""
    group = tokens.groups(tokens.shards[0])[0]
    (row_id, *_), ((chosen, rejected), *_) = group.row_ids, group.pairs
    in_nll = "in the NLL" if orpo.prompt_counts else "not trained (nll_scope=completion)"
    term = "the odds ratio" if orpo.objective == "orpo" else "the margin"
    has_nll = orpo.objective == "orpo" or orpo.cpo_alpha > 0
    of_both = f"in the NLL and {term}" if has_nll else f"in {term}", f"in {term}"
    of_chosen, of_rejected = ("in the NLL", "not used") if orpo.chosen_alone else of_both
    parts = [("prompt", group.prompt, in_nll), ("chosen", group.completions[chosen], of_chosen)]
    if rejected != chosen:
        parts.append(("rejected", group.completions[rejected], of_rejected))
    lines = [f"first pair, {tokens.sources[row_id.source]}:{row_id.row + 1}:"]
    for name, ids, use in parts:
        text = repr(tokenizer.decode(ids))
        shown = text if len(text) <= _SHOWN_TEXT else f"{text[:90]} ... {text[-90:]}"
        lines.append(f"  {name}, {len(ids)} tokens, {use}: {shown}")
    return lines


def constant_prompt_line(tokens: TokenSet, nll_scope: str) -> str | None:
    """A line where most of the NLL is of tokens that begin every prompt, such as a system prompt.

    Of many shards only some are looked at, from the first to the last.
    """
    if nll_scope != "all":
        return None
    tallies = length_tallies(tokens)
    n_pairs = int(tallies["prompt"].sum())
    # Nothing predicts the first token of a prompt.
    n_predicted = n_tokens(tallies["prompt"]) + n_tokens(tallies["chosen"]) - n_pairs
    places = np.linspace(0, len(tokens.shards) - 1, _LOOKED_AT_SHARDS)
    shards = (tokens.shards[place] for place in sorted({round(place) for place in places}))
    prompts = (group.prompt for shard in shards for group in tokens.groups(shard))
    common, share = next(prompts), 0.0
    for prompt in prompts:
        common = _common_prefix(common, prompt)
        share = (len(common) - 1) * n_pairs / max(1, n_predicted)
        if share <= _MOST_OF_NLL:
            break
    if share <= _MOST_OF_NLL:
        return None
    return (
        f"{TRAIN} data: {100 * share:.0f} % of the tokens in the NLL are the same in every row: "
        f"the first {len(common)} of every prompt, such as a template's system prompt; "
        "nll_scope=completion leaves prompts out of the NLL"
    )


def _common_prefix(one: Tokens, other: Tokens) -> Tokens:
    n = min(len(one), len(other))
    apart = np.flatnonzero(one[:n] != other[:n])
    return one[: apart[0] if len(apart) else n]
