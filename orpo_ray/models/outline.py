"""What is known of a base model before its weights are read: config, names, shapes; on the driver.

It is built on the meta device, as in training workers, so that what they would refuse is refused
before they start.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from orpo_ray.pretrained import (
    ModelSource,
    UnsupportedModelError,
    empty_model,
    load_model_config,
    refuse_incomplete,
    weight_files,
)
from orpo_ray.storage.files import some_of
from orpo_ray.storage.folder import Folder

_POSITIONS = re.compile(r"(^|_)(wpe|pos|positions?)(_|$)")
_SPARE_POSITIONS = 8  # rows of a table beyond the positions: OPT and BART have two
# RoPE scalings whose `max_position_embeddings` may be that before scaling; of the others it is not.
_SCALED = ("linear", "dynamic", "yarn")


def outline(source: ModelSource) -> PreTrainedModel:
    """The model on the meta device.

    Raises:
        UnsupportedModelError: for custom code that is not trusted, and for a config of which no
            model can be built.
    """
    model_config = load_model_config(source)
    try:
        with _only_errors(), init_empty_weights(include_buffers=False):
            model: PreTrainedModel = empty_model(source, model_config, dtype=torch.float32)
    except UnsupportedModelError:
        raise
    # A config that lacks what the model asks for, a package that it needs: each in its own way.
    except Exception as error:
        raise UnsupportedModelError(
            f"model_name_or_path: {model_config.model_type}: no causal language model can be built "
            f"of its config: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error
    refuse_part(model_config, model)
    return model


def refuse_part(model_config: PreTrainedConfig, model: PreTrainedModel) -> None:
    """Refuse a model of which only a part is built that transformers does not load by itself.

    Raises:
        UnsupportedModelError: naming it.
    """
    own = type(model.config)
    if own is not type(model_config) and own not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"model_name_or_path: {model_config.model_type}: only its text model would be trained "
            f"and exported, a {model.config.model_type} that transformers does not load"
        )


def unused_weights(source: ModelSource, model: PreTrainedModel) -> list[str]:
    """Compare the headers of a local folder's weights with the model; gives those it lacks.

    transformers does it, with its renamed, merged, split and tied weights, on tensors without
    values. For hub models and folders in buckets it is done by the worker that reads the weights.

    Args:
        source: of the base model.
        model: its outline.

    Raises:
        UnsupportedModelError: for files that are missing or damaged, and for weights that are
            missing or have another shape.
    """
    is_remote = isinstance(source.model, Folder) and source.model.url is not None
    if is_remote or not Path(source.model).is_dir():
        return []
    if getattr(model.config, "quantization_config", None) is not None:
        return []  # stored under names and in shapes of the quantization's own
    headers: dict[str, Tensor] = {}
    for file in weight_files(source):
        headers |= _header(source, file)
    with _only_errors():
        try:
            _, found = type(model).from_pretrained(
                None,
                config=model.config,
                state_dict=headers,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except RuntimeError as error:
            raise UnsupportedModelError(
                f"{source.model}: its weights do not fit the model of its config.json: "
                f"{' '.join(str(error).split())}"
            ) from error
    refuse_incomplete(source.model, found)
    return sorted(found["unexpected_keys"])


def _header(source: ModelSource, file: Path) -> dict[str, Tensor]:
    """Names and shapes of a file's tensors, as tensors without values."""
    if not file.is_file():
        raise UnsupportedModelError(f"{source.model} has no {file.name}: download the model again")
    try:
        with safe_open(file, framework="pt") as content:
            slices = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118
            packed = [name for name in slices if slices[name].get_dtype().startswith("F8")]
            if packed and any("scale" in name for name in slices):
                raise UnsupportedModelError(
                    f"{source.model}: weights are stored in 8 bits ({some_of(packed)}), and its "
                    "config.json has no quantization_config that says how: name the model that it "
                    "was quantized from, or save this one with save_original_format=False"
                )
            return {n: torch.empty(s.get_shape(), device="meta") for n, s in slices.items()}
    except SafetensorError as error:
        raise UnsupportedModelError(
            f"{source.model}: {file.name} is damaged ({error}): download the model again"
        ) from error


@contextlib.contextmanager
def _only_errors() -> Iterator[None]:
    """No warnings of transformers, which says of meta tensors what is said here of the model."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


@dataclass(frozen=True)
class Positions:
    """How many positions a model has.

    Args:
        n: number of positions.
        is_table: whether there is nothing beyond them: they are rows of a table, learned or not.
            RoPE is computed for any position.
    """

    n: int
    is_table: bool


def positions(model: PreTrainedModel) -> Positions | None:
    """The positions of a model; None where its config names no limit (ALiBi, recurrent models)."""
    config = model.config.get_text_config()
    named = getattr(config, "max_position_embeddings", None)
    if not isinstance(named, int) or named <= 0:
        return None
    tables = [rows for module in _modules(model) for rows in _table_rows(*module, named)]
    if tables:
        return Positions(min(tables), is_table=True)
    return Positions(_scaled(config, named), is_table=False)


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name.rpartition(".")[2], module) for name, module in model.named_modules())


def _table_rows(name: str, module: nn.Module, named: int) -> Iterator[int]:
    """The positions of every table of positions that a module holds itself."""
    attributes = {k: v for k, v in vars(module).items() if isinstance(v, Tensor)}  # CTRL's
    for part, tensor in {**module._parameters, **module._buffers, **attributes}.items():
        is_named = _POSITIONS.search(name) or _POSITIONS.search(part)
        if tensor is None or tensor.ndim != 2 or not is_named:
            continue
        if not named <= len(tensor) <= named + _SPARE_POSITIONS:
            continue  # of an image encoder
        # RoBERTa counts from the row after its padding token's.
        padding = getattr(module, "padding_idx", None)
        first = getattr(module, "offset", 0 if padding is None else padding + 1)
        yield min(named, len(tensor) - first)


def _scaled(config: Any, named: int) -> int:
    """The positions that RoPE is scaled to."""
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer = [part for part in rope.values() if isinstance(part, dict)]
    scaled = [named]
    for part in by_layer or [rope]:
        factor, own = part.get("factor"), part.get("original_max_position_embeddings")
        if part.get("rope_type") in _SCALED and factor:
            scaled.append(int((own or named) * factor))
    return max(scaled)
