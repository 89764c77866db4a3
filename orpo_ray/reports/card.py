"""`README.md` of an exported model: from what, with what, how well; on the driver."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from orpo_ray.config.file import to_yaml
from orpo_ray.config.schema import ORPOConfig
from orpo_ray.reports.curves import CURVES
from orpo_ray.reports.page import render
from orpo_ray.reports.run import HEADLINE, evaluations_until, facts, headline
from orpo_ray.runs.files import FINAL, exported_step, read_metrics
from orpo_ray.storage.mirror import publish
from orpo_ray.version import __version__


def write_model_card(
    run_directory: Path, config: ORPOConfig, data_report: Mapping[str, Any]
) -> Path:
    """Write the card of `final/`, with the curves of the run if they were drawn.

    Args:
        run_directory: of a finished run.
        config: of the run, resolved.
        data_report: what `data_report.json` holds.

    Returns:
        Its path.
    """
    final = run_directory / FINAL
    lines = read_metrics(run_directory)
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
        names=list(HEADLINE.values()),
        rows=headline(run_directory, evaluations_until(lines, exported_step(final)), data_report),
        curves=CURVES if curves.exists() else None,
        max_length=config.data.max_length,
        settings=to_yaml(config),
    )
    path = final / "README.md"
    ModelCard(text).save(path)
    publish(*(final / name for name in (CURVES, path.name) if (final / name).exists()))
    return path


def _data_text(name: str, counts: Mapping[str, Any]) -> str:
    """The rows of one data set; of one that was held out there is only the number."""
    if "rows_read" not in counts:
        return f"{name}: {counts['rows_kept']} rows held out of the training files"
    refused = ", ".join(f"{n} {reason}" for reason, n in sorted(counts["refused"].items()))
    return (
        f"{name}: {counts['rows_read']} rows read, {counts['rows_kept']} kept, "
        f"{counts['rows_held_out']} held out, {counts['rows_refused']} refused"
        f"{f' ({refused})' if refused else ''}; {counts['truncated_pairs']} pairs truncated"
    )
