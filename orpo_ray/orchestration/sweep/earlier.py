"""What earlier attempts of a sweep searched, and what is left of it to run; on the driver."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.tune.search.sample import Categorical, Domain, Function, Quantized

from orpo_ray.config.schema import SECTION_OF, ConfigError, ORPOConfig
from orpo_ray.runs.mirror import TUNE_STATE
from orpo_ray.runs.resume import decisive_settings
from orpo_ray.storage.folder import Folder

SWEEP = "sweep.json"
# Besides what decides a model's weights: how long trials are, and how they are drawn and stopped.
_COMPARED = (
    *("max_steps", "num_train_epochs", "eval_steps", "metric", "metric_mode", "repeats"),
    *("search_algorithm", "trial_scheduler", "grace_steps", "reduction_factor"),
)
_DATA = "train_data"


@dataclass(frozen=True)
class SweepPart:
    """Samples that one run of Ray Tune draws: of the first command, or of one that asked for more.

    Args:
        state: where Ray Tune keeps its state of them.
        n_samples: how many, for each point of a grid.
        n_before: samples of the parts before it.
    """

    state: Folder
    n_samples: int
    n_before: int


def refuse_another_sweep(
    folder: Folder, config: ORPOConfig, space: Mapping[str, Any], data_digest: str | None = None
) -> None:
    """Refuse to go on with a sweep of another search space, other settings or other data.

    More samples are no difference.

    Args:
        folder: of the sweep.
        config: of every trial, but for what is searched.
        space: domains of `ray.tune` by setting.
        data_digest: see `decisive_settings`; None: the data is not known yet.

    Raises:
        ConfigError: with every difference.
    """
    before, now = folder.read_json(SWEEP), _record(config, space, data_digest)
    if not before:
        return
    lines = [
        f"search.{name}: {before['search'].get(name, 'not searched')} in the earlier sweep, "
        f"{now['search'].get(name, 'not searched')} now"
        for name in sorted(before["search"].keys() | now["search"].keys())
        if before["search"].get(name) != now["search"].get(name)
    ]
    old, new = before["settings"], now["settings"]
    for name in sorted(old.keys() & new.keys()):  # others came or went with a version
        if old[name] == new[name]:
            continue
        if name == _DATA:
            lines.append(f"{_DATA}: the training pairs are not those of the earlier sweep")
        else:
            values = (json.dumps(value[name]) for value in (old, new))
            lines.append("{}: {} in the earlier sweep, {} now".format(name, *values))
    n_before, n_now = sum(before["samples"]), config.tune.num_samples
    if n_now < n_before:
        lines.append(f"tune.num_samples: {n_before} in the earlier sweep, {n_now} now")
    if lines:
        hint = f"{folder}/{SWEEP} is of another sweep: set these back, or choose another run_name"
        raise ConfigError([*lines, hint])


def sweep_parts(
    folder: Folder, config: ORPOConfig, space: Mapping[str, Any], data_digest: str
) -> list[SweepPart]:
    """The parts of a sweep that may go on, with one more for samples that are new; recorded."""
    samples = list(folder.read_json(SWEEP).get("samples", ()))
    more = config.tune.num_samples - sum(samples)
    if more > 0:
        samples.append(more)
        record = _record(config, space, data_digest) | {"samples": samples}
        folder.write_json(SWEEP, record, indent=1)
    first = folder / TUNE_STATE
    return [
        SweepPart(first / f"part-{i + 1}" if i else first, n, sum(samples[:i]))
        for i, n in enumerate(samples)
    ]


def _record(
    config: ORPOConfig, space: Mapping[str, Any], data_digest: str | None
) -> dict[str, Any]:
    """What makes a sweep this one."""
    values = config.model_dump(mode="json")
    settings = decisive_settings(config, data_digest or "")
    if data_digest is None:
        del settings[_DATA]
    settings |= {name: values[SECTION_OF[name]][name] for name in _COMPARED}
    settings["global_batch_size"] = config.pairs_per_step
    return {
        "search": {name: _domain_text(domain) for name, domain in space.items()},
        "settings": {name: value for name, value in settings.items() if name not in space},
    }


def _domain_text(domain: Any) -> str:
    """A domain of `ray.tune` as text: the same for equal ones, without addresses of objects."""
    if not isinstance(domain, Domain):
        return str(domain)
    if isinstance(domain, Function):
        return f"sample_from({getattr(domain.func, '__qualname__', 'function')})"
    if isinstance(domain, Categorical):
        return f"choice({', '.join(map(str, domain.categories))})"
    sampler, rest = domain.get_sampler(), ""
    if isinstance(sampler, Quantized):
        sampler, rest = sampler.get_sampler(), f" in steps of {sampler.q}"
    numbers = [f", {n} {v}" for n, v in vars(sampler).items() if isinstance(v, int | float)]
    kind = type(sampler).__name__.strip("_").lower()
    bounds = domain.domain_str.strip("()")
    return f"{type(domain).__name__.lower()} {kind}({bounds}{''.join(numbers)}){rest}"
