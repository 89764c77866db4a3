"""What a sweep searches: `loguniform(0.05, 0.5)` and the like, checked and handed to Ray Tune.

A setting may have a domain of its own for an objective, as `search.simpo.beta`.
"""

import ast
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray import tune

from orpo_ray.config.schema import (
    SECTION_OF,
    SECTIONS,
    ConfigError,
    ORPOConfig,
    settings_that_decide,
)
from orpo_ray.config.train import OBJECTIVE_SETTINGS

# A trial may not set who it is, where it runs, or what the sweep is: the sections in which no
# setting decides tokens or weights.
_FIXED = SECTIONS.keys() - {
    SECTION_OF[leaf] for leaf in settings_that_decide("tokens") | settings_that_decide("weights")
}
_OBJECTIVES = OBJECTIVE_SETTINGS.keys() - SECTIONS.keys()  # orpo.beta is the setting itself
_FORMS: dict[str, tuple[int, Callable[..., Any]]] = {
    "uniform": (2, tune.uniform),
    "loguniform": (2, tune.loguniform),
    "randint": (2, tune.randint),
}


def search_space(config: ORPOConfig) -> dict[str, Any]:
    """Ray Tune's domains by setting; unset, beta and the learning rate around the config's own.

    Raises:
        ConfigError: naming every entry that is no setting, no expression, or reaches values that
            the setting does not take.
    """
    entries = dict(config.search) or _default_entries(config)
    findings: list[str] = []
    space = {}
    for name, entry in entries.items():
        section, _, leaf = name.rpartition(".")
        is_known = not section or section in SECTIONS or section in _OBJECTIVES
        if not is_known or leaf not in SECTION_OF or SECTION_OF[leaf] in _FIXED:
            findings.append(f"search.{name}: not a setting that can be searched")
            continue
        try:
            domain, samples = _domain(entry)
        except ValueError as error:
            findings.append(f"search.{name}: {error} (got {entry!r})")
            continue
        own = {"objective": section} if section in _OBJECTIVES else {}
        key = f"{section}.{leaf}" if own else leaf
        findings += _refused(config.replace(**own), key, leaf, samples)
        space[key] = domain
    if findings:
        raise ConfigError(findings)
    return space


def trial_values(config: ORPOConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a trial, of the values that were drawn for all objectives.

    Args:
        config: of the sweep.
        values: by the names in the space: `beta`, `simpo.beta`.
    """
    objective = values.get("objective", config.orpo.objective)
    plain = {name: value for name, value in values.items() if "." not in name}
    own = {
        name.removeprefix(f"{objective}."): value
        for name, value in values.items()
        if name.startswith(f"{objective}.")
    }
    used = OBJECTIVE_SETTINGS[objective]
    unused = frozenset().union(*OBJECTIVE_SETTINGS.values()) - used
    return {name: value for name, value in (plain | own).items() if name not in unused}


def _default_entries(config: ORPOConfig) -> dict[str, str]:
    """A factor of about 3 to both sides."""
    beta = config.orpo.beta or 0.1
    rate = config.train.learning_rate or 8e-6
    return {
        "beta": f"loguniform({beta / 3:.4g}, {min(beta * 3, 100.0):.4g})",
        "learning_rate": f"loguniform({rate / 3:.4g}, {min(rate * 3, 1.0):.4g})",
    }


def _domain(entry: str | Sequence[Any]) -> tuple[Any, list[Any]]:
    """A domain, and values at its ends to try the setting with.

    Raises:
        ValueError: saying what is expected instead.
    """
    if not isinstance(entry, str):
        return tune.choice(list(entry)), list(entry)
    expected = "expected loguniform(a, b), uniform(a, b), randint(a, b), choice(...) or grid(...)"
    name, _, rest = entry.partition("(")
    name = name.strip()
    if not rest.rstrip().endswith(")") or name not in (*_FORMS, "choice", "grid"):
        raise ValueError(expected)
    try:
        values = ast.literal_eval(f"[{rest.rstrip()[:-1]}]")
    except (ValueError, SyntaxError):
        # Names without quotes, as a shell leaves them: choice(linear, cosine).
        values = [part.strip() for part in rest.rstrip()[:-1].split(",")]
    if len(values) == 1 and isinstance(values[0], list | tuple):
        values = list(values[0])
    if not values:
        raise ValueError(expected)
    if name == "choice":
        return tune.choice(values), values
    if name == "grid":
        return tune.grid_search(values), values
    return _interval(name, values), list(values)


def _interval(name: str, values: Sequence[Any]) -> Any:
    count, make = _FORMS[name]
    numbers = [v for v in values if isinstance(v, int | float) and math.isfinite(v)]
    if len(values) != count or len(numbers) != count or not values[0] < values[1]:
        raise ValueError(f"{name} takes two numbers, the smaller one first")
    if name == "loguniform" and values[0] <= 0:
        raise ValueError("loguniform takes numbers above 0")
    return make(*values)


def _refused(config: ORPOConfig, name: str, leaf: str, samples: Sequence[Any]) -> list[str]:
    """What the config says against values of the domain of `name`."""
    findings = []
    for value in samples:
        try:
            config.replace(**{leaf: value})
        except ConfigError as error:
            findings.append(f"search.{name}: {error.lines[0].partition(': ')[2]}")
    return findings
