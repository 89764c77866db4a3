"""Export a model to a folder that transformers and vLLM load; in training workers."""

import json
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, cached_file

from orpo_ray.config.model import ModelSection
from orpo_ray.models.adapters import save_adapters
from orpo_ray.models.orpo_model import OrpoModel
from orpo_ray.pretrained import (
    ModelSource,
    load_model,
    load_model_config,
    load_tokenizer,
    on_this_node,
)
from orpo_ray.runs.files import RECORD
from orpo_ray.storage.files import read_json
from orpo_ray.storage.folder import Folder, FolderLike, light
from orpo_ray.storage.relocation import base_record


def export_model(
    place: FolderLike, model: OrpoModel, source: ModelSource, config: ModelSection, step: int
) -> None:
    """Gather the weights on rank 0 and write model, configs and tokenizer; a collective.

    The folder is written under a temporary name and renamed.

    Args:
        place: target folder; replaced if it exists.
        model: sharded over all ranks.
        source: of the base model, whose config and tokenizer are exported.
        config: says whether there are adapters, and whether they are merged.
        step: optimizer steps that the model was trained for.
    """
    adapted = config.lora_r is not None
    base = load_model_config(source)
    dtype = base.dtype or torch.float32
    named = _gathered(model, None if adapted else dtype)  # adapters are merged in fp32
    if dist.get_rank() == 0:
        final = Folder.at(place)
        beside = final.path.with_name(f"{final.name}.tmp")
        shutil.rmtree(beside, ignore_errors=True)
        if adapted:
            save_adapters(beside, load_model(source, torch.float32), config, named, dtype)
        else:
            model.causal_lm.config.dtype = dtype
            model.causal_lm.save_pretrained(beside, state_dict=named)
        tokenizer = load_tokenizer(source)
        if (beside / "config.json").exists():
            _restore_config(beside / "config.json", base)
            _stop_at(tokenizer.eos_token_id, beside, source, base)
        tokenizer.save_pretrained(beside)
        record: dict[str, int | str] = {"step": step}
        if adapted and not config.merge_adapter:
            record |= base_record(on_this_node(source.model, light), final.path)
        (beside / RECORD).write_text(json.dumps(record) + "\n")
        final.remove()
        beside.rename(final.path)
        written = sorted(path.name for path in final.path.iterdir() if path.name != RECORD)
        final.publish(*written, RECORD)  # by which it is known to be whole
    dist.barrier()


def _gathered(model: OrpoModel, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """The weights by name in the host's memory on rank 0, nothing on other ranks.

    Gathered one at a time, so that no rank holds the whole model in the type that is trained.

    Args:
        model: sharded over all ranks.
        dtype: of all weights but those that transformers keeps in fp32; unset: only what was
            trained, in its own.
    """
    options = StateDictOptions(ignore_frozen_params=dtype is None)
    # Gathered, a tied weight would be a tensor of its own under each name; files have the first.
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied -= {name for name, _ in model.named_parameters()}
    in_fp32 = [
        *(getattr(model.causal_lm, "_keep_in_fp32_modules", None) or ()),
        *(getattr(model.causal_lm, "_keep_in_fp32_modules_strict", None) or ()),
    ]
    gathered = {}
    for name, weight in get_model_state_dict(model, options=options).items():
        if not isinstance(weight, torch.Tensor) or name in tied:
            continue
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        if dist.get_rank() == 0:
            kept = dtype is None or not whole.is_floating_point()
            fp32 = any(f".{part}." in f".{name}." for part in in_fp32)
            asked = whole.dtype if kept else torch.float32 if fp32 else dtype
            gathered[name.removeprefix("causal_lm.")] = whole.to("cpu", asked)
    return gathered


def _restore_config(path: Path, base: PreTrainedConfig) -> None:
    """Training changed dropout and caching settings; the model's own are exported."""
    exported = json.loads(path.read_text(encoding="utf-8"))
    exported.pop("_name_or_path", None)  # a folder of this machine, or of whoever made the base
    exported |= {
        name: value
        for name, value in base.to_diff_dict().items()
        if name in exported and name not in ("dtype", "transformers_version")
    }
    # save_pretrained writes that of training.
    exported["dtype"] = str(base.dtype or torch.float32).removeprefix("torch.")
    path.write_text(json.dumps(exported, indent=2) + "\n", encoding="utf-8")


def _stop_at(end: int, folder: Path, source: ModelSource, base: PreTrainedConfig) -> None:
    """Let generation stop at the token that answers were trained to end with.

    `generation_config.json` is what transformers' `generate` and vLLM stop by. It is the base
    model's where that has one, so that its sampling settings are kept, too.

    Args:
        end: the token, which is added to those that the base model stops at.
        folder: of the exported model.
        source: of the base model.
        base: its config.
    """
    path = folder / GENERATION_CONFIG_NAME
    own = cached_file(
        on_this_node(source.model, light),
        GENERATION_CONFIG_NAME,
        revision=source.revision,
        _raise_exceptions_for_missing_entries=False,
    )
    generation = json.loads(Path(own).read_text(encoding="utf-8")) if own else read_json(path)
    generation["eos_token_id"] = _with_end(end, generation.get("eos_token_id"))
    path.write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    if hasattr(base, "eos_token_id"):  # else it is part of a config within the config
        config = read_json(folder / CONFIG_NAME)
        config["eos_token_id"] = _with_end(end, base.eos_token_id)
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _with_end(end: int, own: int | list[int] | None) -> int | list[int]:
    """The tokens that a model stops at, and `end` as the first of them unless it is one."""
    ends = own if isinstance(own, list) else [] if own is None else [own]
    if end in ends and own is not None:
        return own
    return [end, *ends] if ends else end
