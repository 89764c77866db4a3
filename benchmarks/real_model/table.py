"""The results as Markdown, to be pasted into RESULTS.md."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from orpo_ray.runs.statistics import Difference, Estimate
from real_model.plan import CHOICE, CLAIM, MODEL, SECOND
from real_model.verdict import CLAIMED, Comparison

COLUMNS = (
    *("accuracy", "length_controlled_accuracy", "log_odds", "margin"),
    *("logps_chosen", "logps_rejected", "nll"),
)
_SHOWN_CHARACTERS = 160


def head(about: Mapping[str, Any]) -> Iterator[str]:
    """What is measured and what is claimed, which is written before anything is scored."""
    yield f"## {about['date']}: a pretrained model on real pairs, {about['machine']}"
    yield ""
    yield f"`{about['command']}`, commit {about['commit']}, {about['versions']}."
    yield f"Model: {MODEL}. Pairs of at most {about['max_length']} tokens: " + ", ".join(
        f"{n} {name}" for name, n in about["pairs"].items() if name != "overlap"
    )
    yield f"({about['pairs']['overlap']} held-out pairs whose prompt is trained are left out)."
    yield f"Settings of all sides: `{about['settings']}`; seeds {about['seeds']}."
    yield ""
    yield f"**Claim, written before the held-out pairs were scored.** {CLAIM} {SECOND}"
    yield ""
    yield f"**Learning rate.** {CHOICE}"


def rate_line(choice: Mapping[str, Any]) -> str:
    """What the learning rate was chosen by."""
    tried = ", ".join(f"{rate}: {nll:.4f}" for rate, nll in choice["dev_nll"].items())
    return f"Rate {choice['rate']:g}; " + (f"NLL by rate {tried}." if tried else "none was tried.")


def sides(figures: Mapping[str, Mapping[str, Estimate]]) -> Iterator[str]:
    """One row a kind of side, over its seeds, with 95 % intervals."""
    yield "| side | " + " | ".join(name.replace("_", " ") for name in COLUMNS) + " |"
    yield "|---" * (len(COLUMNS) + 1) + "|"
    for name, found in figures.items():
        cells = (_estimate(found[column]) for column in COLUMNS)
        yield f"| {name} | " + " | ".join(cells) + " |"


def comparisons(found: Mapping[str, Comparison]) -> Iterator[str]:
    """One row a comparison and statistic, with 95 % intervals; p by flipping signs of prompts."""
    yield "| difference | statistic | value (95 % interval) | p | by seed |"
    yield "|---|---|---|---|---|"
    for name, compared in found.items():
        for column in COLUMNS:
            value: Difference | Estimate
            p, seeds = "", ""
            if column in compared.tested:
                value = tested = compared.tested[column]
                p = f"{tested.p_value:.3f}"
            else:
                value = compared.others[column]
            if column == "log_odds":
                seeds = ", ".join(f"{d:+.4f}" for d in compared.by_seed)
            yield f"| {name} | {column.replace('_', ' ')} | {_difference(value)} | {p} | {seeds} |"


def verdict(compared: Comparison) -> str:
    """Whether the claim came out."""
    found = "; ".join(
        f"{name.replace('_', ' ')} {d.value:+.4f}, p {d.p_value:.3f}"
        for name, d in ((name, compared.tested[name]) for name in CLAIMED)
    )
    return f"**{'Shown' if compared.holds else 'NOT SHOWN'}: ORPO less SFT, {found}.**"


def second(compared: Comparison) -> Iterator[str]:
    """What else was expected of ORPO less SFT; shown where the interval is on that side of 0."""
    expected = {
        "accuracy": ("is higher", 1),
        "length_controlled_accuracy": ("is higher", 1),
        "logps_rejected": ("is lower", -1),
    }
    found = {**compared.others, **compared.tested}
    for name, (says, sign) in expected.items():
        value = found[name]
        shown = min(sign * value.low, sign * value.high) > 0
        text = f"{name.replace('_', ' ')} {says}: {_difference(value)}"
        yield f"- {'shown' if shown else 'not shown'}: {text}"
    yield f"- its price in NLL of chosen answers, nats a token: {_difference(found['nll'])}"


def samples(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    """Mean lengths of greedy answers, and how each begins."""
    yield "| answers by | general, tokens | harmful, tokens | ended |"
    yield "|---|---|---|---|"
    for name, given in found.items():
        means = [
            statistics.mean(answer["tokens"] for answer in given if answer["kind"] == kind)
            for kind in ("general", "harmful")
        ]
        ended = sum(answer["ended"] for answer in given)
        yield f"| {name} | {means[0]:.1f} | {means[1]:.1f} | {ended} of {len(given)} |"
    yield ""
    for index, first in enumerate(next(iter(found.values()), ())):
        yield f"- {first['prompt']}"
        for name, given in found.items():
            text = " ".join(given[index]["answer"].split())
            more = "..." if len(text) > _SHOWN_CHARACTERS else ""
            yield f"  - {name}: {text[:_SHOWN_CHARACTERS]}{more}"


def commands(found: Mapping[str, str]) -> Iterator[str]:
    """The command of every side."""
    yield "```"
    yield from found.values()
    yield "```"


def as_json(found: Mapping[str, Comparison]) -> dict[str, Any]:
    """The comparisons, and whether each meets what the claim asks for."""
    return {name: asdict(each) | {"holds": each.holds} for name, each in found.items()}


def _difference(value: Difference | Estimate) -> str:
    return f"{value.value:+.4f} ({value.low:+.4f} to {value.high:+.4f})"


def _estimate(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"
