"""Three steps of a run on a tiny model of a family, in gloo processes."""

import traceback
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from orpo_ray.models.outline import outline, refuse_part
from orpo_ray.models.packing_check import refuse_unknown
from orpo_ray.models.small_copy import make_every_part_count
from orpo_ray.pretrained import ModelSource, UnsupportedModelError
from orpo_ray.runs.files import read_metrics
from tests.families.tiny import tiny_config
from tests.reference.small_run import train_small

LARGEST = 45_000_000  # parameters of a model that is tiny enough


def tiny_family(family: str, **changes: Any) -> PreTrainedModel:
    """A random model of a family, under whose weights every part has an effect.

    Args:
        family: a type of transformers' causal mapping.
        changes: settings of its text model.

    Raises:
        ValueError: where its smallest config is too large.
        UnsupportedModelError: where only a part of it would be trained.
    """
    config = tiny_config(family)
    for name, value in changes.items():
        setattr(config.get_text_config(), name, value)
    with torch.device("meta"):
        sketch = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    n_parameters = sum(p.numel() for p in sketch.parameters())
    if n_parameters > LARGEST:
        raise ValueError(f"{family} has {n_parameters:,} parameters at the least")
    refuse_part(config, sketch)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    make_every_part_count(model)
    return model.eval()


def save(family: str, folder: Path) -> None:
    """Write a tiny model of a family where `make_inputs` left another one."""
    for path in (folder / "model").glob("*"):
        if path.name in ("config.json", "generation_config.json") or "safetensors" in path.name:
            path.unlink()
    tiny_family(family).save_pretrained(folder / "model")


def trained(folder: Path, family: str) -> str:
    """What becomes of three steps on this rank: `trained`, or the line of the refusal."""
    run = folder / "runs" / family
    changes = {"max_steps": 3, "eval_steps": None, "evaluate": False, "save_steps": 1000}
    try:
        refuse_unknown(outline(ModelSource(str(folder / "model"), str(folder / "model"))))
        train_small(folder, run, changes)
    except UnsupportedModelError as error:
        return f"refused: {error}"
    except Exception:
        return f"crashed: {traceback.format_exc()}"
    n_steps = [line["step"] for line in read_metrics(run)][-1]
    return "trained" if n_steps == 3 else f"stopped at step {n_steps}"
