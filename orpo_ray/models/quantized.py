"""A frozen base model in 4 bits (QLoRA), as bitsandbytes holds it; in training workers."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from orpo_ray.pretrained import ModelSource, UnsupportedModelError, load_model


def refuse_quantization(device: torch.device) -> None:
    """Refuse 4-bit weights where they are not supported.

    Raises:
        UnsupportedModelError: with the fix.
    """
    if device.type != "cuda":
        raise UnsupportedModelError(
            "load_in_4bit: 4-bit weights are multiplied on GPUs only: set use_gpu=true, or train "
            "adapters of the whole weights without it"
        )
    if find_spec("bitsandbytes") is None:
        raise UnsupportedModelError(
            "load_in_4bit: needs the package bitsandbytes: pip install 'orpo_ray[qlora]'"
        )


def load_quantized(
    source: ModelSource, model_config: PreTrainedConfig, bf16: bool, device: torch.device
) -> PreTrainedModel:
    """The base model on its device: linear layers in NF4, with constants quantized once more.

    Embeddings, norms and head are not quantized; they are in the type that is computed in, as
    nothing of the base is trained.

    Args:
        source: of the base model; every rank reads it.
        model_config: of it, as it is to be trained.
        bf16: whether matrix products are in bfloat16.
        device: of this rank.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    options = {
        "config": model_config,
        "device_map": {"": device},
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    }
    causal_lm: PreTrainedModel = load_model(source, dtype, **options)
    for module in causal_lm.modules():
        module.register_state_dict_post_hook(_without_quantization_state)
    return causal_lm.requires_grad_(False)


def _is_quantized(parameter: nn.Parameter) -> bool:
    return type(parameter).__name__ == "Params4bit"


def n_weights(parameter: nn.Parameter) -> int:
    """Weights of a parameter, of which bitsandbytes packs two of 4 bits into a byte."""
    return parameter.numel() * (2 if _is_quantized(parameter) else 1)


def quantized_text(model: nn.Module) -> str:
    """How many base weights are in 4 bits: linear layers, which do not include experts."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    in_4_bits = sum(map(n_weights, filter(_is_quantized, frozen)))
    n_all = sum(map(n_weights, frozen))
    return f"load_in_4bit: {in_4_bits:,} of the base's {n_all:,} weights are in 4 bits"


def _without_quantization_state(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    """Drop the quantization state: 4-bit weights are loaded from the base model, never saved.

    Checkpoints look up a parameter for each name, and these have none.
    """
    for name in [name for name in state if name.startswith(f"{prefix}weight.")]:
        del state[name]
