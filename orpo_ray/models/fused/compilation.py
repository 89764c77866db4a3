"""Compile decoder layers with torch.compile; in training workers."""

from collections.abc import Iterable
from importlib.util import find_spec

import torch
from torch import nn

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.models.orpo_model import OrpoModel


def is_compiled(
    model: OrpoModel, device: torch.device, config: ORPOConfig, is_unsharded: bool
) -> bool:
    """Whether the decoder layers of a model are compiled.

    Where the config leaves it open, on one GPU and for decoders of plain layers: what was measured
    to be faster (benchmarks/RESULTS.md). Layers with adapters took over a minute to compile.
    Compiled kernels are tuned anew in every process, and add in another order then, so not with
    `full_determinism`.

    Args:
        model: not yet sharded.
        device: where it computes.
        config: whose `torch_compile` decides.
        is_unsharded: whether one rank has the whole model, without FSDP.
    """
    asked, causal_lm = config.model.torch_compile, model.causal_lm
    if asked is not None:
        return asked
    is_plain = (
        model.attention == "packed"
        and model.kernel == "varlen"
        and not model.experts_per_token
        and not model.mixers
        and getattr(causal_lm, "_supports_attention_backend", False)  # or its rows are padded
        and getattr(causal_lm, "_can_compile_fullgraph", False)  # transformers' own word for it
        and not getattr(causal_lm.config, "quantization_config", None)
        and not config.model.lora_r
    )
    return (
        device.type == "cuda"
        and is_unsharded
        and is_plain
        and find_spec("triton") is not None
        and not config.model.use_liger_kernel
        and not config.train.full_determinism
        and any(weight.requires_grad for weight in causal_lm.parameters())
    )


def compile_layers(layers: Iterable[nn.Module], config: ORPOConfig) -> None:
    """Compile layers at their first call, for rows of any length.

    Where nobody asked for it, a layer that cannot be compiled is run as it is.
    """
    if config.model.torch_compile is None:
        torch._dynamo.config.suppress_errors = True
    for layer in layers:
        layer.compile(dynamic=True)
