"""Export a model to a folder that transformers and vLLM load; in training workers."""

import json
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
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
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapted)
    weights = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        final = Folder.at(place)
        beside = final.path.with_name(f"{final.name}.tmp")
        shutil.rmtree(beside, ignore_errors=True)
        named = {
            name.removeprefix("causal_lm."): tensor
            for name, tensor in weights.items()
            if isinstance(tensor, torch.Tensor)
        }
        base = load_model_config(source)
        if adapted:
            _write_adapted(beside, named, source, config)
        else:
            _write_whole(beside, model, named, base)
        tokenizer = load_tokenizer(source)
        if (beside / "config.json").exists():
            _restore_config(beside / "config.json", base)
            _stop_at(tokenizer.eos_token_id, beside, source, base)
        tokenizer.save_pretrained(beside)
        (beside / RECORD).write_text(json.dumps({"step": step}) + "\n")
        final.remove()
        beside.rename(final.path)
        written = sorted(path.name for path in final.path.iterdir() if path.name != RECORD)
        final.publish(*written, RECORD)  # by which it is known to be whole
    dist.barrier()


def _write_whole(
    folder: Path, model: OrpoModel, weights: dict[str, torch.Tensor], base: PreTrainedConfig
) -> None:
    """All weights in the base model's own type, but those that transformers keeps in fp32."""
    dtype = base.dtype or torch.float32
    causal_lm = model.causal_lm
    causal_lm.config.dtype = dtype
    kept = [
        *(getattr(causal_lm, "_keep_in_fp32_modules", None) or ()),
        *(getattr(causal_lm, "_keep_in_fp32_modules_strict", None) or ()),
    ]
    named = {
        name: tensor.to(torch.float32 if any(f".{k}." in f".{name}." for k in kept) else dtype)
        for name, tensor in weights.items()
    }
    causal_lm.save_pretrained(folder, state_dict=named)


def _write_adapted(
    folder: Path, weights: dict[str, torch.Tensor], source: ModelSource, config: ModelSection
) -> None:
    """The adapter, or the base model with the adapter merged into it in fp32."""
    base = load_model(source, torch.float32)
    dtype = load_model_config(source).dtype
    save_adapters(folder, base, config, weights, dtype or torch.float32)


def _restore_config(path: Path, base: PreTrainedConfig) -> None:
    """Training changed dropout and caching settings; the model's own are exported."""
    exported = json.loads(path.read_text(encoding="utf-8"))
    exported.pop("_name_or_path", None)  # a folder of this machine, or of whoever made the base
    exported |= {
        name: value
        for name, value in base.to_diff_dict().items()
        if name in exported and name not in ("dtype", "transformers_version")
    }
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
