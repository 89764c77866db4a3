"""The model card: `README.md` of an exported model; on the driver."""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, metadata_load, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from yaml import YAMLError

from orpo_ray.config.file import to_yaml
from orpo_ray.config.schema import ORPOConfig
from orpo_ray.reports.curves import CURVES
from orpo_ray.reports.page import render
from orpo_ray.reports.run import facts, headline
from orpo_ray.runs.evaluations import read_evaluations
from orpo_ray.runs.files import FINAL, exported_step, read_metrics
from orpo_ray.runs.formatting import format_rows
from orpo_ray.runs.metrics import HEADLINE
from orpo_ray.storage.folder import Folder
from orpo_ray.version import __version__

_CARD = "README.md"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
# Settings that say where something is.
_PLACES = {
    "model": ("model_name_or_path", "baseline"),
    "data": ("dataset_name", "train_files", "eval_files", "token_cache_dir", "chat_template"),
}


@dataclass(frozen=True)
class _Paper:
    """Where an objective is from."""

    key: str
    title: str
    authors: str
    arxiv: str


_PAPERS = {
    "orpo": _Paper(
        "hong2024orpo",
        "ORPO: Monolithic Preference Optimization without Reference Model",
        "Hong, Jiwoo and Lee, Noah and Thorne, James",
        "2403.07691",
    ),
    "simpo": _Paper(
        "meng2024simpo",
        "SimPO: Simple Preference Optimization with a Reference-Free Reward",
        "Meng, Yu and Xia, Mengzhou and Chen, Danqi",
        "2405.14734",
    ),
    "cpo": _Paper(
        "xu2024cpo",
        "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in "
        "Machine Translation",
        "Xu, Haoran and Sharaf, Amr and Chen, Yunmo and Tan, Weiting and Shen, Lingfeng and "
        "Van Durme, Benjamin and Murray, Kenton and Kim, Young Jin",
        "2401.08417",
    ),
}
_METHODS = {
    "orpo": "ORPO (Odds Ratio Preference Optimization",
    "simpo": "SimPO (Simple Preference Optimization",
    "cpo": "CPO (Contrastive Preference Optimization",
    "sft": "supervised fine-tuning on the chosen answers",
}


def write_model_card(run: Folder, config: ORPOConfig, data_report: Mapping[str, Any]) -> Path:
    """Write the card of `final/`, with the curves of the run if they were drawn.

    Args:
        run: directory of a finished run.
        config: of the run, resolved.
        data_report: the content of `data_report.json`.

    Returns:
        Its path.
    """
    run_directory, final = run.path, run.path / FINAL
    lines = read_metrics(run_directory)
    evaluations = read_evaluations(run_directory, lines, exported_step(final))
    curves = run_directory / CURVES
    if curves.exists():
        shutil.copyfile(curves, final / CURVES)
    name = config.model.model_name_or_path
    public = _without_places(config)
    shown = public.model.model_name_or_path
    text = render(
        "card.md.j2",
        card_data=_metadata(config).to_yaml(),
        base=f"`{shown}`" if shown else "a small random decoder",
        is_here=name is not None and shown != name,
        method=_METHODS[config.orpo.objective],
        paper=_PAPERS.get(config.orpo.objective),
        run_name=run_directory.name,
        version=__version__,
        facts=facts(public, _without_places_of_data(data_report), lines),
        adapter=config.model.lora_r is not None and not config.model.merge_adapter,
        data=[_data_text(name, counts) for name, counts in data_report.items()],
        names=[metric.label for metric in HEADLINE],
        rows=headline(evaluations, data_report),
        curves=CURVES if curves.exists() else None,
        max_length=config.data.max_length,
        settings=to_yaml(public),
    )
    path = final / _CARD
    ModelCard(text).save(path)
    (run / FINAL).publish(*(n for n in (CURVES, path.name) if (final / n).exists()))
    return path


def _metadata(config: ORPOConfig) -> ModelCardData:
    """What the hub knows a model by; only what is on the hub itself is named."""
    base, data = config.model.model_name_or_path, config.data.dataset_name
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=_license_of(base, config.model.model_revision),
        base_model=base if is_hub_id(base) else None,
        datasets=[data] if data and is_hub_id(data) else None,
        tags=[config.orpo.objective, "preference", "orpo_ray"],
    )


def _license_of(model: str | None, revision: str | None) -> str | None:
    """The license that a model's own card names, as the hub spells it; nothing is downloaded."""
    if model is None:
        return None
    if "://" in model:
        card: Any = Folder.at(model).path / _CARD
    elif is_hub_id(model):
        card = try_to_load_from_cache(model, _CARD, revision=revision)
    else:
        card = Path(model).expanduser() / _CARD
    if not isinstance(card, str | Path) or not Path(card).is_file():
        return None
    try:
        named = (metadata_load(card) or {}).get("license")
    except (OSError, ValueError, YAMLError, RecursionError):
        return None  # a card of others may hold anything
    return named if isinstance(named, str) and _LICENSE.fullmatch(named) else None


def is_hub_id(name: str | None) -> bool:
    """Whether a name is that of a repository on the hub, and no folder here."""
    if name is None or "://" in name or Path(name).expanduser().exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _without_places(config: ORPOConfig) -> ORPOConfig:
    """The config with the last part of every path and URL: where things lay concerns nobody."""

    def shorten(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: shorten(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [shorten(inner) for inner in value]
        return _last_part(value) if isinstance(value, str) else value

    values = config.model_dump(mode="json")
    for section, names in _PLACES.items():
        for name in names:
            values[section][name] = shorten(values[section][name])
    values["output"]["output_dir"] = ORPOConfig().output.output_dir
    return ORPOConfig.model_validate(values)


def _without_places_of_data(report: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: dict(counts)
        | {"sources": {_last_part(path): part for path, part in counts.get("sources", {}).items()}}
        for name, counts in report.items()
    }


def _last_part(place: str) -> str:
    """The name of a file or a folder; a hub id stays whole, and so does a template's text."""
    is_place = "://" in place or place.startswith(("/", "~", ".")) or Path(place).exists()
    return place.rstrip("/").rpartition("/")[2] if is_place and "\n" not in place else place


def _data_text(name: str, counts: Mapping[str, Any]) -> str:
    truncated = counts.get("truncated_pairs")
    more = f"; {truncated} pairs truncated" if truncated is not None else ""
    return f"{name}: {format_rows(counts)}{more}"
