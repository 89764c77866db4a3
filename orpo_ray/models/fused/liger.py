"""Patch a model with Liger's kernels for norms, MLPs and RoPE; in training workers."""

import inspect
import sys
import weakref
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel

from orpo_ray.config.model import ModelSection
from orpo_ray.pretrained import UnsupportedModelError

# Its losses take logits or all hidden states; the LM head here is projected in chunks.
_LOSSES = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def use_liger_kernels(
    causal_lm: PreTrainedModel, device: torch.device, config: ModelSection, is_compiled: bool
) -> bool:
    """Patch a model in place before it is sharded, where the config asks for it or leaves it open.

    Args:
        causal_lm: on any device, the meta device included.
        device: where it will compute.
        config: whose `use_liger_kernel` decides.
        is_compiled: whether its layers are compiled, which has fused kernels of its own.

    Returns:
        Whether it was patched.

    Raises:
        UnsupportedModelError: where it was asked for: off a GPU, without the package, or for a
            family it does not know.
    """
    asked = config.use_liger_kernel
    if asked is None:
        installed = find_spec("liger_kernel") is not None and find_spec("triton") is not None
        usable = device.type == "cuda" and installed and not is_compiled
        if not usable or _kernels_of(causal_lm) is None:
            return False
    elif not asked:
        return False
    refuse_off_gpus(device)
    patch(causal_lm)
    return True


def refuse_off_gpus(device: torch.device) -> None:
    """Refuse Liger's kernels on a device that they do not run on.

    Raises:
        UnsupportedModelError: with the fix.
    """
    if device.type != "cuda":
        raise UnsupportedModelError(
            "use_liger_kernel: Liger's kernels run on GPUs only: set use_gpu=true, or take it out"
        )


def patch(causal_lm: PreTrainedModel) -> None:
    """Give the modules of this model, and no other's, Liger's forward passes.

    Liger also replaces classes of the family's module, which would not take every config when the
    weights are read: they are restored at once. The family's function for rotary embeddings is
    looked up at every forward pass, and is restored once this model no longer exists.

    Raises:
        UnsupportedModelError: without the package, or for a family it does not know.
    """
    apply = _kernels_of(causal_lm)
    if apply is None:
        raise UnsupportedModelError(
            f"use_liger_kernel: Liger has no kernels for {causal_lm.config.model_type}: take it out"
        )
    module = vars(sys.modules[type(causal_lm).__module__])
    before = dict(module)
    off = {name: on for name, on in _LOSSES.items() if name in inspect.signature(apply).parameters}
    apply(model=causal_lm, **off)
    replaced = {name: value for name, value in before.items() if module[name] is not value}
    classes = {name: value for name, value in replaced.items() if isinstance(value, type)}
    module.update(classes)
    functions = {name: value for name, value in replaced.items() if name not in classes}
    weakref.finalize(causal_lm, module.update, functions).atexit = False


def _kernels_of(causal_lm: PreTrainedModel) -> Any:
    """Liger's function that patches this family; None where it has none."""
    return getattr(_liger(), f"apply_liger_kernel_to_{causal_lm.config.model_type}", None)


def _liger() -> Any:
    try:
        import liger_kernel.transformers
    except ImportError as error:
        raise UnsupportedModelError(
            "use_liger_kernel: needs the package liger-kernel: pip install 'orpo_ray[liger]'"
        ) from error
    return liger_kernel.transformers
