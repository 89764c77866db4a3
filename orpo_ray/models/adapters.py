"""LoRA through peft: adapters put into a model, and written out again; in training workers."""

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from orpo_ray.config.model import ModelSection
from orpo_ray.pretrained import (
    ModelSource,
    UnsupportedModelError,
    base_of_adapters,
    on_this_node,
)
from orpo_ray.storage.folder import light

_ADAPTER = "default"  # peft's own name for an only adapter
_CLOSE_NAMES = 3


def add_adapters(causal_lm: PreTrainedModel, config: ModelSection, seed: int) -> None:
    """Put LoRA adapters into a model in place and freeze everything else.

    Args:
        causal_lm: on any device, the meta device included.
        config: with `lora_r` set.
        seed: of the adapters' first weights, which are therefore the same in every process.

    Raises:
        UnsupportedModelError: for targets that the model has not, and for an adapted head, whose
            loss is computed from its plain weight.
    """
    peft = _peft()
    _refuse_unknown_targets(causal_lm, config.lora_target_modules or ())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            peft.inject_adapter_in_model(_lora_config(config), causal_lm, _ADAPTER)
        except ValueError as error:
            raise UnsupportedModelError(f"lora_target_modules: {error}") from error
    if not isinstance(causal_lm.get_output_embeddings(), torch.nn.Linear):
        raise UnsupportedModelError("lora_target_modules: the LM head cannot be adapted")


def _refuse_unknown_targets(causal_lm: PreTrainedModel, targets: Sequence[str]) -> None:
    """Refuse names that are of no module; peft passes over them if another one is.

    Raises:
        UnsupportedModelError: naming them, and modules with a similar name.
    """
    modules = [name for name, _ in causal_lm.named_modules()]
    linear = {
        name.rpartition(".")[2]
        for name, module in causal_lm.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and module is not causal_lm.get_output_embeddings()
    }
    problems = []
    for target in targets:
        if any(f".{name}".endswith(f".{target}") for name in modules):
            continue
        close = difflib.get_close_matches(target, sorted(linear), n=_CLOSE_NAMES)
        # Of another family's names none may be close.
        hint = f"did you mean {' or '.join(close)}?" if close else f"it has {sorted(linear)}"
        problems.append(f"{target!r} is no module of {causal_lm.config.model_type}; {hint}")
    if problems:
        raise UnsupportedModelError("\n".join(f"lora_target_modules: {p}" for p in problems))


def base_of(source: ModelSource) -> tuple[ModelSource, Any]:
    """The base model of LoRA adapters with their peft config; for any other model itself and None.

    Args:
        source: folder or hub id.

    Raises:
        UnsupportedModelError: for a base model that is not there.
    """
    model = on_this_node(source.model, light)
    base = base_of_adapters(source, model)
    if base is None:
        return source, None
    adapters = _peft().PeftConfig.from_pretrained(model, revision=source.revision)
    return dataclasses.replace(source, model=base, revision=adapters.revision), adapters


def inject_adapters(causal_lm: PreTrainedModel, adapters: Any) -> None:
    """Put adapters of a peft config into a model in place; their weights are still to come."""
    _peft().inject_adapter_in_model(adapters, causal_lm, _ADAPTER)


def save_adapters(
    folder: Path,
    causal_lm: PreTrainedModel,
    config: ModelSection,
    adapter_weights: dict[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """Write `adapter_config.json` and weights, or the merged model with `merge_adapter`.

    Args:
        folder: where.
        causal_lm: the base model as it was loaded, without adapters.
        config: with `lora_r` set.
        adapter_weights: whole tensors by their names in a model with adapters.
        dtype: of a merged model's weights.
    """
    peft = _peft()
    adapted = peft.get_peft_model(causal_lm, _lora_config(config), _ADAPTER)
    named = {f"base_model.model.{name}": tensor for name, tensor in adapter_weights.items()}
    unexpected = adapted.load_state_dict(named, strict=False).unexpected_keys
    if unexpected:
        raise AssertionError(f"adapter weights that the model does not know: {unexpected[:3]}")
    if config.merge_adapter:
        adapted.merge_and_unload().to(dtype).save_pretrained(folder)
    else:
        adapted.save_pretrained(folder)


def _lora_config(config: ModelSection) -> Any:
    targets = config.lora_target_modules
    return _peft().LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(targets) if targets else "all-linear",
        task_type="CAUSAL_LM",
    )


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UnsupportedModelError(
            "lora_r: adapters need the package peft: pip install 'orpo_ray[lora]'"
        ) from error
    return peft
