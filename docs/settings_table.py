"""The table of settings in `docs/settings.md`, from the schema: `python docs/settings_table.py`."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orpo_ray.config.schema import SECTIONS

PAGE = Path(__file__).parent / "settings.md"
_MARKED = re.compile(r"(?<=^<!-- settings: ).*?(?=^<!-- end of settings -->)", re.DOTALL | re.M)
_NAMES = {"boolean": "bool", "integer": "int", "number": "float", "string": "str", "null": "null"}


def with_settings(page: str) -> str:
    """Return the page with the tables between its markers replaced by those of the schema."""
    note = "generated from orpo_ray/config by docs/settings_table.py; run `make docs` -->"
    return _MARKED.sub(lambda _: f"{note}\n\n{settings_tables()}\n\n", page)


def settings_tables() -> str:
    """Every section with its docstring and a table of its settings, in Markdown."""
    parts = []
    for section, model in SECTIONS.items():
        schema = model.model_json_schema()
        rows = ["| setting | type | default | description |", "|---|---|---|---|"]
        for name, field in model.model_fields.items():
            default = json.dumps(field.get_default(), default=list)
            text = type_text(schema["properties"][name], schema.get("$defs", {}))
            cells = (f"`{name}`", text, f"`{default}`", field.description or "")
            rows.append(f"| {' | '.join(map(_escaped, cells))} |")
        parts += [f"### {section}", _escaped(str(model.__doc__)), "\n".join(rows)]
    return "\n\n".join(parts)


def type_text(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """Describe the values that a JSON schema accepts, as in `int >= 1 or null`."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        return " or ".join(type_text(part, definitions) for part in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        values = schema.get("enum") or [schema["const"]]
        return ", ".join(f"`{json.dumps(value)}`" for value in values)
    kind = schema.get("type")
    if kind == "array":
        items = schema.get("prefixItems") or [schema["items"]]
        listed = ", ".join(type_text(item, definitions) for item in items)
        if "prefixItems" in schema:
            return f"[{listed}]"
        return f"list of ({listed})" if " or " in listed else f"list of {listed}"
    if kind == "object" and "properties" in schema:
        return f"{{{', '.join(schema['properties'])}}}"
    if kind == "object":
        return f"{{str: {type_text(schema['additionalProperties'], definitions)}}}"
    return _NAMES[str(kind)] + _bounds(schema)


def _bounds(schema: Mapping[str, Any]) -> str:
    """An interval, or one inequality where only one side is bounded."""
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    if low is None and high is None:
        return ""
    if high is None:
        return f" {'>=' if 'minimum' in schema else '>'} {low:g}"
    left = "[" if "minimum" in schema else "("
    right = "]" if "maximum" in schema else ")"
    return f" in {left}{low:g}, {high:g}{right}"


def _escaped(text: str) -> str:
    """Text without bars; a placeholder as in `<output_dir>/cache` is code, not an HTML tag."""
    return re.sub(r"(?<!`)(?:<\w+>[\w/]*)+", r"`\g<0>`", text.replace("|", r"\|"))


if __name__ == "__main__":
    PAGE.write_text(with_settings(PAGE.read_text()))
