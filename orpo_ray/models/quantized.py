"""A frozen base model in 4 bits (QLoRA), as bitsandbytes holds it; bases that are stored quantized.

Weights are quantized in training workers; what is stored quantized is looked at on the driver.
"""

import copy
import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from orpo_ray.pretrained import ModelSource, UnsupportedModelError, load_model
from orpo_ray.storage.files import first_line

# Methods of which transformers computes the weights again, and the class that asks for it. In its
# original format a model would be quantized again when it is saved.
_DEQUANTIZED_BY = {
    "fp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
    "compressed-tensors": "CompressedTensorsConfig",
}


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


def refuse_stored_quantized(source: ModelSource) -> None:
    """Refuse to train a base model that is stored quantized; reads its config.json only.

    Raises:
        UnsupportedModelError: with the method and what to do.
    """
    values, _ = PreTrainedConfig.get_config_dict(os.fspath(source.model), revision=source.revision)
    parts = (values, values.get("text_config") or {})
    names = ("quantization_config", "compression_config")
    stored = next((part[name] for part in parts for name in names if part.get(name)), None)
    if stored is None:
        return
    method = stored.get("quant_method") or "by a method that its config.json does not name"
    advice = "name the model that it was quantized from"
    if method in ("awq", "bitsandbytes", "gptq"):
        advice += ", and set load_in_4bit=true and lora_r to hold that in 4 bits"
    elif method in _DEQUANTIZED_BY:
        config = f"{_DEQUANTIZED_BY[method]}(dequantize=True)"
        advice += (
            ", or the folder of AutoModelForCausalLM.from_pretrained(..., "
            f"quantization_config={config}).save_pretrained(..., save_original_format=False)"
        )
    raise UnsupportedModelError(
        f"{source.model} is stored quantized ({method}), and such weights are not trained: {advice}"
    )


def refuse_unreadable(name: object, model_config: PreTrainedConfig, on_gpu: bool) -> None:
    """Refuse a model stored in a way that transformers does not read here.

    Args:
        name: of the model.
        model_config: of it.
        on_gpu: whether workers have GPUs; where this process has none it cannot know.

    Raises:
        UnsupportedModelError: with the package that is missing, for one.
    """
    stored = getattr(model_config, "quantization_config", None)
    if stored is None or (on_gpu and not torch.cuda.is_available()):
        return
    from transformers.quantizers.auto import AutoHfQuantizer  # it imports every method's package

    try:
        quantizer = AutoHfQuantizer.from_config(copy.deepcopy(stored), pre_quantized=True)
        quantizer.validate_environment(device_map=None, weights_only=True)
    except (ImportError, RuntimeError, ValueError) as error:
        raise UnsupportedModelError(
            f"{name} is stored quantized and cannot be loaded: {first_line(error)}"
        ) from error


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
