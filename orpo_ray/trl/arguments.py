"""ORPOConfig as TRL's users know it: the settings of a run, by TRL's names as well."""

import contextlib
import dataclasses
import json
import logging
from typing import Any, Self

import yaml
from pydantic import PrivateAttr

from orpo_ray.config import schema
from orpo_ray.config.schema import SECTION_OF, SECTIONS, ConfigError
from orpo_ray.trl.names import names
from orpo_ray.trl.translations import translate

_log = logging.getLogger("orpo_ray")
# What scripts ask of the process that they run in: here it is the driver alone.
_DRIVER = {"process_index": 0, "local_process_index": 0, "n_gpu": 0, "device": "cpu"}
_DRIVER |= {"should_save": True, "should_log": True}


class ORPOConfig(schema.ORPOConfig):
    """The config of a run: `ORPOConfig(beta=0.2, num_workers=8)`, or by sections.

    Setting names are unique, so a setting may be given and read in its section or at the top
    level. TRL's names are accepted, and read back, as `docs/trl.md` lists them; what becomes of
    them is logged. Arguments of a command line are parsed as in TRL:
    `HfArgumentParser(ORPOConfig)`.

    Args:
        output_dir: parent folder of run directories; may be positional.
        settings: by name.

    Raises:
        ConfigError: for unknown names, wrong types and values out of bounds, a line each.
    """

    _given: dict[str, Any] = PrivateAttr(default_factory=dict)

    def __init__(self, output_dir: Any = None, /, **settings: Any) -> None:
        if output_dir is not None:
            settings["output_dir"] = output_dir
        found = translate(settings)
        try:
            super().__init__(**found.settings)
        except ConfigError as error:
            found.findings += error.lines
        if found.findings:
            raise ConfigError(found.findings)
        self._given = found.kept
        for line in found.notes:
            _log.info(line)
        for line in found.warnings:
            _log.warning(line)

    def __getattr__(self, name: str) -> Any:
        if name in SECTION_OF:
            return getattr(getattr(self, SECTION_OF[name]), name)
        if name in names():
            return self._given.get(name, names()[name].default)
        if name in _DRIVER:
            return _DRIVER[name]
        return super().__getattr__(name)  # type: ignore[misc]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SECTION_OF or name in names():
            raise AttributeError(f"a config does not change: args = args.replace({name}={value!r})")
        super().__setattr__(name, value)

    def replace(self, **leaves: Any) -> Self:
        """A copy with some settings changed, validated like a new config."""
        found = translate(leaves)
        changed = type(self)(**leaves)._given if found.kept else {}
        new = super().replace(**found.settings)
        new._given = self._given | changed
        return new

    def to_dict(self) -> dict[str, Any]:
        """Every setting by its name alone, and those that were given under TRL's names."""
        given: dict[str, Any] = json.loads(json.dumps(self._given, default=str))
        return super().to_dict() | given

    @property
    def world_size(self) -> int:
        """The number of workers, or the most of them."""
        return self.ray.max_workers

    @property
    def train_batch_size(self) -> int:
        """Pairs per worker and forward pass in training."""
        return self.train.per_device_train_batch_size

    @property
    def eval_batch_size(self) -> int:
        """Pairs per worker and forward pass in evaluation."""
        return self.train.per_device_eval_batch_size

    def to_sanitized_dict(self) -> dict[str, Any]:
        """`to_dict` with values that trackers take: numbers, texts and truth values."""
        plain = (bool, int, float, str)
        return {n: v if isinstance(v, plain) else str(v) for n, v in self.to_dict().items()}

    def get_process_log_level(self) -> int:
        """The level of the root logger."""
        return logging.getLogger().getEffectiveLevel()

    def main_process_first(self, *_: Any, **__: Any) -> Any:
        """A context in which nothing waits: there is one process, the driver."""
        return contextlib.nullcontext()


def _parsed(text: str) -> Any:
    """The value of an argument, which is written as in a config file."""
    value = yaml.safe_load(text)
    return text if isinstance(value, dict) and not text.startswith("{") else value


def _describe_as_dataclass() -> None:
    """Let `HfArgumentParser`, and `dataclasses.replace`, see a dataclass of all names.

    Those of models and data that TRL's ORPOConfig does not have are left out: `ModelConfig` and
    `ScriptArguments` of the same parser have them. None stands for TRL's default.
    """
    types: dict[str, Any] = {}
    fields: list[tuple[str, Any, Any]] = []
    for name, section in SECTION_OF.items():
        if section in ("model", "data", "tune") and name not in names():
            continue
        described = SECTIONS[section].model_fields[name]
        is_flag = described.annotation in (bool, bool | None)
        types[name] = bool if is_flag else _parsed
        fields.append((name, types[name], dataclasses.field(default=described.get_default())))
    for name, row in names().items():
        if name not in types:
            is_flag = isinstance(row.default, bool)
            types[name] = bool if is_flag else _parsed
            default = row.default if is_flag else None
            fields.append((name, types[name], dataclasses.field(default=default)))
    types["report_to"] = list[str]
    as_dataclass: Any = dataclasses.make_dataclass("ORPOConfig", fields)
    described_class: Any = ORPOConfig
    described_class.__dataclass_fields__ = as_dataclass.__dataclass_fields__
    described_class.__annotations__ |= types


_describe_as_dataclass()
