"""A copy of a model's structure that is small enough to compute in fp32 at every start.

The first layers, as many as hold every kind of layer that the model has, with few experts, a small
vocabulary and short windows, and with random weights under which every part has an effect.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from orpo_ray.models.layer_config import setting, without_dropout
from orpo_ray.models.lm_head import probe_ids

WINDOW = 8
_VOCABULARY = 128
_WIDTH = 64
_LARGEST = {"cpu": 150_000_000, "cuda": 600_000_000}  # parameters, in fp32
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_WINDOWS = (
    *("sliding_window", "attention_window_size", "attention_chunk_size", "window_size"),
    *("chunk_size", "mamba_chunk_size", "block_size"),
    *("index_topk", "indexer_budget", "index_block_size", "index_topk_blocks"),
)
_INNER = (
    *("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"),
    *("intermediate_size_mlp", "ffn_dim", "decoder_ffn_dim", "n_inner", "ffn_hidden_size"),
)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_ROUTED = ("num_experts_per_tok", "moe_topk", "moe_k")


def small_copy(causal_lm: PreTrainedModel, device: torch.device) -> PreTrainedModel | None:
    """Make the copy on a device; None where none can be made that is small enough.

    Random numbers of the run are left as they are.

    Args:
        causal_lm: the model, also on the meta device.
        device: of the copy.
    """
    config = causal_lm.config
    n_layers = _n_layers(causal_lm)
    limit = _LARGEST.get(device.type, _LARGEST["cpu"])
    for parts in (_WINDOWS + _INNER + _EXPERTS + ("vocab_size",), _WINDOWS, ()):
        with contextlib.suppress(Exception), _quiet(), torch.random.fork_rng([]):
            small = _smaller(config, n_layers, parts)
            with init_empty_weights(include_buffers=False):
                sketch = _built(type(causal_lm), small)
            if sum(p.numel() for p in sketch.parameters()) > limit:
                continue
            torch.manual_seed(0)
            model = _built(type(causal_lm), small)
            make_every_part_count(model)
            model = model.to(device).eval()
            _try(model, device)
            return model
    return None


@torch.no_grad()
def _try(model: PreTrainedModel, device: torch.device) -> None:
    """Run it once, so that an error that its small numbers cause leads to larger ones."""
    ids = probe_ids(model, (2, 3 * WINDOW), seed=3).to(device)
    hidden = model.base_model(input_ids=ids, use_cache=False)[0]
    if not hidden.isfinite().all():
        raise ValueError("not finite")


def _built(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    return cls._from_config(copy.deepcopy(config), **options)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def decoder_layers(causal_lm: PreTrainedModel) -> list[nn.Module]:
    """The layers of the decoder; none where they are not found."""
    config = causal_lm.config.get_text_config()
    named = {value for name in _LAYERS if isinstance(value := setting(config, name), int)}
    lists = [m for m in causal_lm.modules() if isinstance(m, nn.ModuleList) and len(m) in named]
    return list(max(lists, key=lambda layers: sum(1 for _ in layers.modules()), default=()))


def _n_layers(causal_lm: PreTrainedModel) -> int | None:
    """How many of the first layers hold every kind of layer; None where they are not found."""
    layers = decoder_layers(causal_lm)
    if not layers:
        return None
    settings = causal_lm.config.get_text_config().to_dict().values()
    by_layer = [v for v in settings if isinstance(v, list) and len(v) == len(layers)]
    kinds = [
        (_parts(layer), *(str(values[index]) for values in by_layer))
        for index, layer in enumerate(layers)
    ]
    last_new = max(kinds.index(kind) for kind in set(kinds))
    return max(2, last_new + 1)


def _parts(layer: nn.Module) -> tuple[tuple[str, str], ...]:
    """The modules of a layer, by name and class, of experts only the first."""
    parts = ((name, type(module).__name__) for name, module in layer.named_modules())
    numbers = [value for value in vars(layer).values() if isinstance(value, bool | str)]
    return (*(part for part in parts if ".experts." not in part[0]), ("", str(numbers)))


def _smaller(
    config: PreTrainedConfig, n_layers: int | None, parts: tuple[str, ...]
) -> PreTrainedConfig:
    """The config with fewer layers, and with the given settings made small."""
    whole = config.to_dict()
    text = config.get_text_config()
    key = next(
        (name for name in getattr(config, "sub_configs", {}) if setting(config, name) is text), None
    )
    inner = whole if key is None else whole[key]
    _shrink(inner, n_layers, parts)
    for name in ("dtype", "torch_dtype", "quantization_config"):
        whole.pop(name, None)
    small = type(config).from_dict(whole)
    for part in (small, small.get_text_config()):
        without_dropout(part)
    return small


def _shrink(settings: dict[str, Any], n_layers: int | None, parts: tuple[str, ...]) -> None:
    before = next((settings[name] for name in _LAYERS if isinstance(settings.get(name), int)), None)
    if n_layers is not None and before is not None and n_layers < before:
        for name, value in list(settings.items()):
            if name in _LAYERS and value == before:
                settings[name] = n_layers
            elif isinstance(value, list) and len(value) == before:
                settings[name] = value[:n_layers]
        by_layer = settings.get("per_layer_config")
        if isinstance(by_layer, dict):
            kept = {k: v for k, v in by_layer.items() if int(k) < n_layers}
            settings["per_layer_config"] = kept
    routed = max([1, *(settings[n] for n in _ROUTED if isinstance(settings.get(n), int))])
    sizes = dict.fromkeys(_WINDOWS, WINDOW) | dict.fromkeys(_INNER, _WIDTH)
    sizes |= dict.fromkeys(_EXPERTS, max(4, 2 * routed)) | {"vocab_size": _VOCABULARY}
    for name in parts:
        if isinstance(value := settings.get(name), int) and not isinstance(value, bool):
            settings[name] = min(value, sizes[name])
    if "vocab_size" in parts:
        for name, value in settings.items():
            if name.endswith("_token_id") and isinstance(value, int) and value >= _VOCABULARY:
                settings[name] = value % _VOCABULARY


@torch.no_grad()
def make_every_part_count(model: nn.Module) -> None:
    """Give every matrix the size that keeps its input's, and move every vector off its start.

    What a model is initialised with may hide a part: zero matrices, factors near zero.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter.add_(0.05 * torch.randn_like(parameter))
        elif parameter.mean().abs() <= 0.2 * parameter.std() or not parameter.any():
            parameter.normal_(std=1.0 if id(parameter) in embeddings else _std(parameter))


def _std(parameter: Tensor) -> float:
    inputs = parameter.shape[1] if parameter.ndim == 2 else max(parameter.shape[1:])
    return float(inputs**-0.5)
