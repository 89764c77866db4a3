"""What the sections of the settings are made of: their base class, their fields and their types."""

import math
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from orpo_ray.config.secrets import find_secrets
from orpo_ray.storage.bucket import PROTOCOLS
from orpo_ray.storage.hiding import HIDDEN
from orpo_ray.storage.names import UnsafeNameError, refuse_unsafe_url

Decides = Literal["tokens", "weights", "run"]
"""What a setting decides.

`tokens`: what ingest writes, so a trial with a value of its own needs token sets of its own.
`weights`: what one training step does, so a checkpoint of another value is another run's.
`run`: neither, but how long and how often, where, and how the work is cut; it may change when a run
is resumed.
"""


def setting(default: Any, description: str, *, decides: Decides, **limits: Any) -> Any:
    """A field of a section.

    Args:
        default: its value where none is given.
        description: for `--help`: a sentence that stands by itself, with the unit.
        decides: see `Decides`.
        limits: of its values, as pydantic's `Field` takes them (`ge`, `lt`, `pattern`, ...).
    """
    extra: dict[str, JsonValue] = {"decides": decides}
    return Field(default, description=description, json_schema_extra=extra, **limits)


def _known_place(value: str) -> str:
    protocol, is_url, rest = value.partition("://")
    if is_url and (protocol not in PROTOCOLS or not rest.strip("/")):
        raise ValueError("give a path, s3://bucket/folder or gs://bucket/folder")
    if not is_url:
        return value
    try:
        refuse_unsafe_url(value)
    except UnsafeNameError as error:
        raise ValueError(str(error)) from error
    return value.rstrip("/")


def _some_interval(value: Any) -> Any:
    if value == "epoch":
        return value
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if 0 < number < 1:
        return number
    if number >= 1 and number == int(number):
        return int(number)
    raise ValueError("give a number of steps from 1, a share of all steps below 1, or epoch")


PositiveInt = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Place = Annotated[str, AfterValidator(_known_place)]
Interval = Annotated[
    PositiveInt | Annotated[float, Field(gt=0.0, lt=1.0)] | Literal["epoch"],
    BeforeValidator(_some_interval),
]
"""How often: a number of optimizer steps, a share of all of them, or an epoch."""


class Section(BaseModel):
    """A frozen group of settings that refuses unknown names and secrets."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True
    )

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, values: Any) -> Any:
        findings = find_secrets(values)
        if findings:
            # An error of pydantic's own making would show the input.
            details = [
                InitErrorDetails(
                    type=PydanticCustomError("secret", "{text}", {"text": text}), input=HIDDEN
                )
                for text in findings
            ]
            raise ValidationError.from_exception_data(cls.__name__, details, hide_input=True)
        return values
