"""The model card: `README.md` of an exported model; on the driver."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

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
    name = config.model.model_name_or_path
    is_hub_id = name is not None and "://" not in name and not Path(name).expanduser().exists()
    curves = run_directory / CURVES
    if curves.exists():
        shutil.copyfile(curves, final / CURVES)
    data = ModelCardData(
        library_name="transformers",
        base_model=name if is_hub_id else None,
        tags=["orpo", "preference", "orpo_ray"],
    )
    text = render(
        "card.md.j2",
        card_data=data.to_yaml(),
        base=f"`{name}`" if name else "a small random decoder",
        run_name=run_directory.name,
        version=__version__,
        facts=facts(config, data_report, lines),
        adapter=config.model.lora_r is not None and not config.model.merge_adapter,
        data=[_data_text(name, counts) for name, counts in data_report.items()],
        names=[metric.label for metric in HEADLINE],
        rows=headline(evaluations, data_report),
        curves=CURVES if curves.exists() else None,
        max_length=config.data.max_length,
        settings=to_yaml(config),
    )
    path = final / "README.md"
    ModelCard(text).save(path)
    (run / FINAL).publish(*(n for n in (CURVES, path.name) if (final / n).exists()))
    return path


def _data_text(name: str, counts: Mapping[str, Any]) -> str:
    truncated = counts.get("truncated_pairs")
    more = f"; {truncated} pairs truncated" if truncated is not None else ""
    return f"{name}: {format_rows(counts)}{more}"
