"""Building a sharded model: meta device, FSDP2, then weights from rank 0; in training workers."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from transformers import PreTrainedConfig, PreTrainedModel

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.models.adapters import add_adapters, base_of, inject_adapters
from orpo_ray.models.attention.kernels import Kernel, choose_kernel, kernel_support
from orpo_ray.models.fused.compilation import compile_layers, is_compiled
from orpo_ray.models.fused.liger import use_liger_kernels
from orpo_ray.models.layer_config import is_dropout, without_dropout
from orpo_ray.models.mixed_precision import MixedPrecision
from orpo_ray.models.orpo_model import ASKED, AttentionPath, OrpoModel
from orpo_ray.models.quantized import load_quantized, refuse_quantization
from orpo_ray.pretrained import (
    ModelSource,
    UnsupportedModelError,
    empty_model,
    load_model,
    load_model_config,
    on_this_node,
)
from orpo_ray.storage.files import some_of
from orpo_ray.storage.folder import Folder, everything


def build_model(config: ORPOConfig, model_path: str | Folder, device: torch.device) -> OrpoModel:
    """Build the model with its weights sharded over all ranks.

    Only rank 0 reads the weights, on the host, and broadcasts them parameter by parameter. Master
    weights are fp32; those below adapters are in the dtype of computation.

    Args:
        config: the run's config.
        model_path: folder or hub id.
        device: of this rank.

    Raises:
        UnsupportedModelError: for custom model code, and for weights that are not safetensors.
    """
    origin = ModelSource.from_config(config.model, model_path)
    model_config = load_model_config(origin)
    if config.model.disable_dropout:
        without_dropout(model_config)
    if config.model.load_in_4bit:
        refuse_quantization(device)
        return build_quantized(config, origin, model_config, device)

    def with_adapters(causal_lm: PreTrainedModel) -> PreTrainedModel:
        if config.model.lora_r:
            add_adapters(causal_lm, config.model, config.train.seed)
            if use_bf16(config, device):
                narrow_frozen(causal_lm)
        return causal_lm

    # Buffers stay real: rotary frequencies are computed, not loaded.
    with init_empty_weights(include_buffers=False):
        causal_lm = with_adapters(empty_model(origin, model_config, dtype=torch.float32))
    freeze(causal_lm, config.model.frozen_weights)
    return _with_weights(
        causal_lm, lambda: with_adapters(load_model(origin, torch.float32)), device, config
    )


def narrow_frozen(causal_lm: PreTrainedModel) -> None:
    """Hold frozen weights in bfloat16, to which a step would round them anyway.

    After the adapters are added, which get the type of the layer that they are put on.
    """
    for weight in causal_lm.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.to(torch.bfloat16)


def build_evaluated_model(
    config: ORPOConfig, model_path: str | Folder, device: torch.device
) -> OrpoModel:
    """Build a model for evaluation, with the adapters that it is stored with, if any.

    Its weights are in the dtype of computation. They are sharded over all ranks, or over
    `shard_size`; where that is one rank, and where they are in 4 bits or stored quantized, every
    rank reads and holds all of them.

    Args:
        config: the run.
        model_path: folder or hub id, of a model or of adapters.
        device: of this rank.

    Raises:
        UnsupportedModelError: see `build_model`.
    """
    origin = ModelSource.from_config(config.model, model_path)
    bf16 = use_bf16(config, device)
    dtype = torch.bfloat16 if bf16 else torch.float32
    base, adapters = base_of(origin)
    model_config = load_model_config(base)
    if config.model.load_in_4bit:
        refuse_quantization(device)
        causal_lm = load_quantized(base, model_config, bf16, device)
        if adapters is not None:
            causal_lm.load_adapter(on_this_node(origin.model, everything))
        return _around(causal_lm, device, config)
    shard_size = config.ray.shard_size or dist.get_world_size()
    is_whole = shard_size == 1 and not _offloads(config, device)
    if is_whole or getattr(model_config, "quantization_config", None) is not None:
        return _around(load_model(origin, dtype).requires_grad_(False).to(device), device, config)
    with init_empty_weights(include_buffers=False):
        causal_lm = empty_model(base, model_config, dtype=dtype)
        if adapters is not None:
            inject_adapters(causal_lm, adapters)
    causal_lm.requires_grad_(False)
    return _with_weights(causal_lm, lambda: load_model(origin, dtype), device, config)


def freeze(causal_lm: nn.Module, names: Sequence[str]) -> None:
    """Freeze weights by their names, or by those of modules.

    Raises:
        UnsupportedModelError: for a name that is none of the model's, and when no weight is left.
    """
    frozen = {
        name: [
            weight
            for full, weight in causal_lm.named_parameters(remove_duplicate=False)
            if full == name or full.startswith(f"{name}.")
        ]
        for name in names
    }
    if unknown := [name for name, weights in frozen.items() if not weights]:
        raise UnsupportedModelError(f"frozen_weights: the model has no {some_of(unknown)}")
    for weight in itertools.chain.from_iterable(frozen.values()):
        weight.requires_grad_(False)
    if not any(weight.requires_grad for weight in causal_lm.parameters()):
        raise UnsupportedModelError("frozen_weights: no weight is left to train")


def _with_weights(
    causal_lm: PreTrainedModel,
    load: Callable[[], PreTrainedModel],
    device: torch.device,
    config: ORPOConfig,
) -> OrpoModel:
    """The sharded model around a decoder on the meta device, with the weights that rank 0 loads."""
    model = _sharded(causal_lm, device, config, ignored=set())
    _materialise(model, torch.device("cpu") if _offloads(config, device) else device)
    weights = _weights(load)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=options)
    causal_lm.tie_weights()
    _move_buffers(model, device)
    return model


def build_quantized(
    config: ORPOConfig, origin: ModelSource, model_config: PreTrainedConfig, device: torch.device
) -> OrpoModel:
    """Build adapters, which are sharded, on a base in 4 bits, of which every rank has a copy.

    The adapters' first weights are the same on all ranks by their seed.
    """
    causal_lm = load_quantized(origin, model_config, use_bf16(config, device), device)
    add_adapters(causal_lm, config.model, config.train.seed)
    frozen = {p for p in causal_lm.parameters() if not p.requires_grad}
    return _sharded(causal_lm, device, config, ignored=frozen)


def _sharded(
    causal_lm: PreTrainedModel,
    device: torch.device,
    config: ORPOConfig,
    ignored: set[nn.Parameter],
) -> OrpoModel:
    """The model around a decoder, with everything but the ignored parameters sharded."""
    model = _around(causal_lm, device, config)
    if config.train.gradient_checkpointing:
        _checkpoint_activations(causal_lm, config.train.gradient_checkpointing_every)
    _shard(model, device, config, ignored)
    return model


def _around(causal_lm: PreTrainedModel, device: torch.device, config: ORPOConfig) -> OrpoModel:
    """The model around a decoder, with this device's kernels."""
    attention, reason = attention_path(config, causal_lm)
    kernel = packed_kernel(config, causal_lm.config, device)
    model = OrpoModel(causal_lm, attention, config.orpo.router_aux_loss_coef, kernel)
    model.padded_because = reason
    unsharded = is_unsharded(model, device, config)
    model.is_compiled = is_compiled(model, device, config, unsharded)
    model.has_liger = use_liger_kernels(causal_lm, device, config.model, model.is_compiled)
    return model


def _weights(load: Callable[[], PreTrainedModel]) -> dict[str, Any]:
    """All weights on rank 0, none on the others; an error of rank 0 is raised on all ranks.

    Raises:
        UnsupportedModelError: for weights that are not safetensors.
    """
    weights: dict[str, Any] = {}
    problem = [""]
    if dist.get_rank() == 0:
        try:
            source = load()
        except UnsupportedModelError as error:
            problem = [str(error)]
        else:
            weights = {f"causal_lm.{name}": tensor for name, tensor in source.state_dict().items()}
    dist.broadcast_object_list(problem)
    if problem[0]:
        raise UnsupportedModelError(problem[0])
    return weights


def use_bf16(config: ORPOConfig, device: torch.device) -> bool:
    """Whether the run computes in bfloat16; by default on GPUs that support it."""
    if config.train.bf16 is not None:
        return config.train.bf16
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def packed_kernel(
    config: ORPOConfig, model_config: PreTrainedConfig, device: torch.device
) -> Kernel:
    """The attention kernel for packed rows on this device.

    Raises:
        UnsupportedModelError: when the requested kernel cannot run.
    """
    support = kernel_support(model_config, device, use_bf16(config, device))
    return choose_kernel(config.model.attention_kernel, support)


def attention_path(
    config: ORPOConfig, causal_lm: PreTrainedModel
) -> tuple[AttentionPath, str | None]:
    """Packed rows for decoders that use transformers' attention interface, else padded rows.

    Returns:
        The path, and why it is not that of packed rows.
    """
    asked = config.model.attention
    if asked == "padded":
        return "padded", ASKED
    drops = config.model.disable_dropout is False and any(
        value for name, value in causal_lm.config.to_dict().items() if is_dropout(name)
    )
    if asked == "auto" and drops:
        return "padded", "packed attention has no dropout (disable_dropout=false)"
    return "packed", None


def _blocks(causal_lm: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers, by `_no_split_modules` of transformers, which nest in some models.

    Layers that share a part (Zamba's) are left to the root: FSDP has every weight in one unit.
    """
    names = set(causal_lm._no_split_modules or ())
    found = [module for module in causal_lm.modules() if type(module).__name__ in names]
    inner = {id(part) for block in found for part in block.modules() if part is not block}
    outer = [block for block in found if id(block) not in inner]
    n_blocks = Counter(id(weight) for block in outer for weight in block.parameters())
    return [block for block in outer if all(n_blocks[id(w)] == 1 for w in block.parameters())]


def _checkpoint_activations(causal_lm: PreTrainedModel, every: int) -> None:
    """Recompute the activations of every n-th layer in the backward pass."""
    causal_lm.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)


def _shard(
    model: OrpoModel, device: torch.device, config: ORPOConfig, ignored: set[nn.Parameter]
) -> None:
    """FSDP2: every decoder layer a unit, embeddings and head in the root.

    One rank has nothing to gather, see `is_unsharded`. With `shard_size` the weights are sharded
    among so many neighbouring ranks, and the groups of them hold copies: gradients are averaged
    over both, so over all ranks as without.
    """
    blocks, bf16 = _blocks(model.causal_lm), use_bf16(config, device)
    if model.is_compiled:
        compile_layers(blocks, config)
    if is_unsharded(model, device, config):
        model.mixed_precision = MixedPrecision(model, torch.bfloat16) if bf16 else None
        return
    world_size = dist.get_world_size()
    shard_size = config.ray.shard_size or world_size
    if shard_size == world_size:
        mesh = init_device_mesh(device.type, (world_size,))
    else:
        shape = (world_size // shard_size, shard_size)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy()
    if bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options: dict[str, Any] = {
        "mesh": mesh,
        "offload_policy": CPUOffloadPolicy() if _offloads(config, device) else OffloadPolicy(),
        "ignored_params": ignored,
    }
    for block in blocks:
        fully_shard(block, mp_policy=policy, **options)
    # Inputs of the root include counts and weights, which must not be cast to bfloat16.
    root_policy = dataclasses.replace(policy, cast_forward_inputs=False)
    fully_shard(model, mp_policy=root_policy, **options)


def is_unsharded(model: OrpoModel, device: torch.device, config: ORPOConfig) -> bool:
    """Whether the model is left as it is, on one rank, without FSDP.

    The weights and gradients of all layers then exist at once in the dtype of computation too (20
    bytes a trained parameter instead of 16), so on GPUs only where half of the memory holds them.
    """
    if dist.get_world_size() > 1 or _offloads(config, device):
        return False
    if device.type != "cuda":
        return True
    n_bytes = 20 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    return n_bytes < torch.cuda.get_device_properties(device).total_memory // 2


def _offloads(config: ORPOConfig, device: torch.device) -> bool:
    return config.train.cpu_offload and device.type == "cuda"


def _materialise(model: nn.Module, device: torch.device) -> None:
    """Allocate the parameters of a meta model and keep the values of its buffers."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move buffers to the compute device, also with CPU offload.

    After the weights are loaded: `set_model_state_dict` supports one device type at a time.
    """
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
