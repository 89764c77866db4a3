"""The config of a run as one frozen, validated value."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from orpo_ray.config.data import DataSection
from orpo_ray.config.fields import Decides, Section
from orpo_ray.config.findings import finding
from orpo_ray.config.model import ModelSection
from orpo_ray.config.run import OutputSection, RaySection, TuneSection
from orpo_ray.config.train import OrpoSection, TrainSection
from orpo_ray.storage.hiding import hide


class ConfigError(ValueError):
    """An invalid config; each of `lines` is one finding with field and fix, without secrets.

    Args:
        lines: the findings.
        places: of the settings that they are of, section and leaf, where there is one.
    """

    def __init__(self, lines: Sequence[str], places: Sequence[Sequence[int | str]] = ()) -> None:
        self.lines = tuple(map(hide, lines))
        self.places = tuple(map(tuple, places))
        super().__init__("\n".join(self.lines))

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep `lines` when the error is pickled."""
        return (type(self), (self.lines, self.places))


class ORPOConfig(Section):
    """The config of a run: `ORPOConfig(beta=0.2, num_workers=8)`, or by sections.

    Setting names are unique, so a setting may be given and read in its section or at the top
    level: `config.orpo.beta` is `config.beta`.

    Raises:
        ConfigError: for unknown names, wrong types and values out of bounds, a line each.
    """

    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    orpo: OrpoSection = OrpoSection()
    train: TrainSection = TrainSection()
    ray: RaySection = RaySection()
    output: OutputSection = OutputSection()
    tune: TuneSection = TuneSection()
    search: dict[str, str | list[Any]] = Field(
        default_factory=dict, description="Search space of a sweep: a distribution by setting name."
    )

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            found = error.errors()
            lines = [finding(details, SECTION_OF) for details in found]
            places = [details["loc"] for details in found]
        else:
            return
        # Outside the handler: pydantic's own error may show what was given.
        raise ConfigError(lines, places)

    if not TYPE_CHECKING:  # the project's own code names the section, which a checker understands

        def __getattr__(self, name: str) -> Any:
            if name in SECTION_OF:
                return getattr(getattr(self, SECTION_OF[name]), name)
            return super().__getattr__(name)

    @model_validator(mode="before")
    @classmethod
    def _route(cls, values: Any) -> Any:
        return leaves_into_sections(values) if isinstance(values, Mapping) else values

    @field_validator("search", mode="before")
    @classmethod
    def _dotted(cls, search: Any) -> Any:
        """`{simpo: {beta: ...}}`, as YAML and overrides have it, as `{simpo.beta: ...}`."""
        if not isinstance(search, Mapping):
            return search
        flat: dict[Any, Any] = {}
        for name, entry in search.items():
            inner = entry if isinstance(entry, Mapping) else None
            flat |= {name: entry} if inner is None else {f"{name}.{k}": v for k, v in inner.items()}
        return flat

    def total_steps(self, steps_per_epoch: int) -> int:
        """Number of optimizer steps: `max_steps`, or the steps of `num_train_epochs`."""
        if self.train.max_steps > 0:
            return self.train.max_steps
        return math.ceil(self.train.num_train_epochs * steps_per_epoch)

    @property
    def pairs_per_step(self) -> int:
        """Pairs per optimizer step, over all workers."""
        return self.train.global_batch_size or self.pairs_per_worker * self.ray.max_workers

    @property
    def pairs_per_worker(self) -> int:
        """Pairs per optimizer step and worker, where `global_batch_size` does not say otherwise."""
        train = self.train
        return train.per_device_train_batch_size * train.gradient_accumulation_steps

    @property
    def microbatch_tokens(self) -> int:
        """Token budget of a microbatch; a group that is longer gets a microbatch of its own."""
        return self._microbatch_tokens(self.train.per_device_train_batch_size)

    @property
    def eval_microbatch_tokens(self) -> int:
        """Token budget of a forward pass in evaluation."""
        return self._microbatch_tokens(self.train.per_device_eval_batch_size)

    def _microbatch_tokens(self, per_device: int) -> int:
        """The budget that is set; with `auto` its default, since the workers measure it later."""
        asked = self.train.max_tokens_per_microbatch
        return asked if isinstance(asked, int) else per_device * self.data.max_length

    def replace(self, **leaves: Any) -> Self:
        """A copy with some settings changed, validated like a new config."""
        values = self.model_dump()
        for name, value in leaves.items():
            values.get(SECTION_OF.get(name, ""), values)[name] = value
        return type(self)(**values)

    def to_dict(self) -> dict[str, Any]:
        """Every setting by its name alone, in types that JSON has."""
        sections = self.model_dump(mode="json")
        leaves = {leaf: sections[section][leaf] for leaf, section in SECTION_OF.items()}
        return leaves | ({"search": self.search} if self.search else {})

    def to_json_string(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2)

    def with_intervals(self, steps_per_epoch: int) -> Self:
        """With numbers of steps for intervals that are given as a share or an epoch."""
        n_steps = self.total_steps(steps_per_epoch)

        def in_steps(every: float | str | None) -> int | None:
            if every == "epoch":
                return steps_per_epoch
            if isinstance(every, float) and every < 1:
                return math.ceil(every * n_steps)
            return None if every is None else int(every)

        names = ("logging_steps", "eval_steps", "save_steps")
        return self.replace(**{name: in_steps(getattr(self.train, name)) for name in names})


SECTIONS: dict[str, type[Section]] = {
    "model": ModelSection,
    "data": DataSection,
    "orpo": OrpoSection,
    "train": TrainSection,
    "ray": RaySection,
    "output": OutputSection,
    "tune": TuneSection,
}
SECTION_OF = {leaf: name for name, section in SECTIONS.items() for leaf in section.model_fields}


def settings_that_decide(what: Decides) -> frozenset[str]:
    """Leaf names of all settings that decide the tokens, the weights or the run."""
    return frozenset(
        leaf
        for section in SECTIONS.values()
        for leaf, field in section.model_fields.items()
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra["decides"] == what
    )


def leaves_into_sections(values: Mapping[str, Any]) -> dict[str, Any]:
    """Move bare setting names into their sections; unknown names are kept for validation."""
    routed = {
        key: dict(value) if key in SECTIONS and isinstance(value, Mapping) else value
        for key, value in values.items()
        if key not in SECTION_OF
    }
    for leaf in values.keys() & SECTION_OF.keys():
        section = routed.setdefault(SECTION_OF[leaf], {})
        if isinstance(section, dict):
            section[leaf] = values[leaf]
    return routed
