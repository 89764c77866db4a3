"""Loading a config from a YAML file and overrides; all its errors are reported at once."""

import logging
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from orpo_ray.config.references import escape_references, take_out_references
from orpo_ray.config.schema import (
    SECTION_OF,
    SECTIONS,
    ConfigError,
    ORPOConfig,
    leaves_into_sections,
)
from orpo_ray.config.secrets import take_out_secrets
from orpo_ray.storage.bucket import URLS
from orpo_ray.storage.files import one_line
from orpo_ray.storage.folder import VIEWS, Folder

FORMAT_NAME = "format"
_MAX_DEPTH = 100
_log = logging.getLogger(__name__)
FORMAT = 1
"""Of `config.yaml`; increased by each release that adds, removes or renames a setting."""


def load_config(path: str | None, overrides: Sequence[str]) -> ORPOConfig:
    """Load a YAML file with `key=value` overrides and validate the result.

    A file with the format of another version may have settings that are none here: these are
    reported in the log and left out.

    Args:
        path: a YAML file, or None for the defaults.
        overrides: dotted (`orpo.beta=0.2`) or bare (`beta=0.2`) settings; later ones override.

    Raises:
        ConfigError: with all findings, a line each.
    """
    findings: list[str] = []
    in_file = leaves_into_sections({} if path is None else _file_layer(path, findings))
    is_of_another_version = in_file.pop(FORMAT_NAME, FORMAT) != FORMAT
    layers = [leaves_into_sections(_override_layer(text, findings)) for text in overrides]
    if is_of_another_version:
        _leave_out_unknown(in_file, path)
    merged: dict[str, Any] = {}
    for layer in (in_file, *layers):
        _merge(merged, layer, findings)
    try:
        config = ORPOConfig(**merged)
    except ConfigError as error:
        for place, line in zip(error.places, error.lines, strict=True):
            is_of_file = _has(in_file, place) and not any(_has(layer, place) for layer in layers)
            findings.append(f"{path}: {line}" if is_of_file else line)
    if findings:
        raise ConfigError(findings)
    return config


def _leave_out_unknown(in_file: dict[str, Any], path: str | None) -> None:
    """Remove the settings that this version does not have from those of a file, and log them."""
    for name in [name for name in in_file if name not in (*SECTIONS, "search")]:
        del in_file[name]
        _log.warning("%s: %r is no setting of this version, and is left out", path, name)
    for section in SECTIONS:
        values = in_file.get(section)
        if not isinstance(values, dict):
            continue
        for name in list(values):
            if SECTION_OF.get(name) != section:
                del values[name]
                _log.warning(
                    "%s: %s: %r is no setting of this version, and is left out", path, section, name
                )


def to_yaml(config: ORPOConfig, leaves: Container[str] = SECTION_OF) -> str:
    """The config as YAML, which `load_config` reads back to an equal value.

    Args:
        config: of a run.
        leaves: names of the settings that are written; unset: all of them.
    """
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes whatever may be read as a number: readers differ in what is one."""

    def text_node(dumper: Any, text: str) -> Any:
        style = "'" if text.startswith(tuple("+-.0123456789")) else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, text_node)
    values = escape_references(config.model_dump(mode="json"))
    if leaves is not SECTION_OF:
        values = {
            name: part
            for name in SECTIONS
            if (part := {leaf: v for leaf, v in values[name].items() if leaf in leaves})
        }
    content = {FORMAT_NAME: FORMAT, **values}
    text: str = yaml.dump(content, Dumper=Dumper, sort_keys=False)
    return text


def _has(layer: Any, place: Sequence[int | str]) -> bool:
    """Whether a layer of settings says something at a place."""
    for key in place:
        if not isinstance(layer, Mapping):
            return True  # a part of what it says
        if key not in layer:
            return False
        layer = layer[key]
    return bool(place)


def _file_layer(path: str, findings: list[str]) -> dict[str, Any]:
    """The settings of a YAML file; empty, with a finding, if it cannot be read."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        file = _fetched(path) if path.startswith(URLS) else Path(path)
        _refuse_deep(file.read_text(encoding="utf-8"))
        values = _resolved(OmegaConf.load(file), findings)
    except FileNotFoundError:
        findings.append(f"{path}: no such config file")
    except (OSError, UnicodeDecodeError) as error:
        findings.append(f"{path}: cannot be read: {one_line(error)}")
    except (YAMLError, OmegaConfBaseException, RecursionError) as error:
        findings.append(f"{path}: not valid YAML: {one_line(error)}")
    else:
        if isinstance(values, dict):
            return {str(key): value for key, value in values.items()}
        findings.append(f"{path}: holds a list, not settings by name")
    return {}


def _refuse_deep(text: str) -> None:
    """Refuse YAML whose nesting could end the process, as its parser recurses in C.

    Raises:
        YAMLError: for what is no YAML, too.
    """
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise yaml.YAMLError(f"more than {_MAX_DEPTH} lists and mappings in one another")


def _fetched(url: str) -> Path:
    folder, _, name = url.rpartition("/")
    return Folder.at(folder, VIEWS).fetch_file(name)


def _override_layer(override: str, findings: list[str]) -> dict[str, Any]:
    """One `key=value` setting as nested sections."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    name, _, text = override.partition("=")
    secrets = take_out_secrets({name: text or None})
    if secrets:
        findings += secrets  # first: other findings would show the value
        return {}
    if "=" not in override.strip("="):
        findings.append(f"{override}: not a key=value setting")
        return {}
    try:
        _refuse_deep(text)
        values = _resolved(OmegaConf.from_dotlist([override]), findings)
    except (YAMLError, OmegaConfBaseException, RecursionError) as error:
        findings.append(f"{override}: not valid YAML: {one_line(error)}")
        return {}
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}


def _resolved(read: Any, findings: list[str]) -> Any:
    """Resolve references and remove secrets, which are added to the findings.

    References to variables named like secrets are found before resolving, other values after it.
    """
    from omegaconf import OmegaConf

    raw: Any = OmegaConf.to_container(read, resolve=False)
    if not isinstance(raw, dict):
        return raw
    findings += take_out_secrets(raw)
    findings += take_out_references(raw)
    values: Any = OmegaConf.to_container(OmegaConf.create(raw), resolve=True)
    findings += take_out_secrets(values)
    return values


def _merge(target: dict[str, Any], layer: Mapping[str, Any], findings: list[str]) -> None:
    """Merge the sections of `layer` into those of `target`, leaf by leaf."""
    for key, value in layer.items():
        if key in (*SECTIONS, "search") and not isinstance(value, Mapping):
            if value is not None:
                findings.append(f"{key}: is a section; set {key}.<setting> (got {value!r})")
        elif isinstance(value, Mapping) and isinstance(target.get(key), dict):
            target[key] |= value
        else:
            target[key] = value
