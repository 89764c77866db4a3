"""The choice of the attention kernel for packed rows, one for a whole run; in training workers."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch

from orpo_ray.models.layer_config import head_width, setting
from orpo_ray.pretrained import UnsupportedModelError

Kernel = Literal["varlen", "flex", "sdpa"]
_FLASH_WIDTH = 256  # largest head width of flash attention
_FLEX_WIDTH = 16  # smallest head width of FlexAttention on GPUs
_AMPERE = (8, 0)


@dataclass(frozen=True)
class KernelSupport:
    """Capabilities of the device and needs of the model, which decide which kernels can run.

    Args:
        capability: CUDA compute capability; None on other devices.
        half: whether queries and keys are in bfloat16 or float16.
        softcap: whether the model uses logit soft-capping in attention.
        widths: head widths of queries and of values.
        has_triton: whether triton, which compiles FlexAttention, is installed.
    """

    capability: tuple[int, int] | None
    half: bool
    softcap: bool
    widths: tuple[int, int]
    has_triton: bool


def choose_kernel(asked: Kernel | Literal["auto"], support: KernelSupport) -> Kernel:
    """The requested kernel, or with `auto` the first one that can run.

    Raises:
        UnsupportedModelError: when the requested one cannot run.
    """
    if asked == "auto":
        return next(kernel for kernel in get_args(Kernel) if obstacle(kernel, support) is None)
    problem = obstacle(asked, support)
    if problem is not None:
        raise UnsupportedModelError(f"attention_kernel={asked}: {problem}")
    return asked


def obstacle(kernel: Kernel, support: KernelSupport) -> str | None:
    """Why a kernel cannot run, or None if it can."""
    if kernel == "sdpa":
        return None
    if support.capability is None:
        return "it runs on GPUs only"
    if support.capability < _AMPERE:
        return f"it needs a GPU of compute capability 8.0, this one has {support.capability}"
    if kernel == "flex":
        if min(support.widths) < _FLEX_WIDTH:
            return f"it does not take heads narrower than {_FLEX_WIDTH}: these are {support.widths}"
        return None if support.has_triton else "it is compiled by triton: pip install triton"
    if not support.half:
        return "it computes in bfloat16 and float16 only: set bf16=true"
    if support.softcap:
        return "it does not support the logit soft-capping of this model"
    width, value_width = support.widths
    if width != value_width or width > _FLASH_WIDTH or width % 8:
        return f"it does not take heads of width {width} with values of width {value_width}"
    return None


def kernel_support(model_config: Any, device: torch.device, half: bool) -> KernelSupport:
    """Query the capabilities of a device and the needs of a model, from its config."""
    config = model_config.get_text_config()
    width = head_width(config)
    # Multi-head latent attention has other names for the widths.
    query_width = setting(config, "qk_head_dim") or width
    value_width = setting(config, "v_head_dim") or width
    return KernelSupport(
        capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        half=half,
        softcap=setting(config, "attn_logit_softcapping") is not None,
        widths=(query_width, value_width),
        has_triton=find_spec("triton") is not None,
    )


def sliding_windows(model_config: Any) -> frozenset[int | None]:
    """Sliding-window sizes of the layers of a model; None for full attention."""
    config = model_config.get_text_config()
    window = setting(config, "sliding_window")
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return frozenset({window})
    return frozenset(window if kind == "sliding_attention" else None for kind in kinds)
