"""Estimate of batch size, steps and memory for `--dry-run`; on the driver, without Ray."""

from collections.abc import Mapping
from typing import Any

from orpo_ray.config.schema import ConfigError, ORPOConfig
from orpo_ray.preference.reading.finding import find_files
from orpo_ray.preference.reading.readers import count_rows
from orpo_ray.pretrained import ModelSource, UnsupportedModelError, empty_model, load_model_config
from orpo_ray.training.optimizers.memory import is_whole_everywhere, state_bytes

_GIB = 2**30
# fp32 master weight and gradient.
_BYTES_PER_PARAMETER = 8
_OPTIMIZERS = {
    "adamw": "AdamW",
    "adamw_8bit": "AdamW in 8 bits",
    "adafactor": "Adafactor's factors",
}
# NF4 has half a byte and a constant a 64 weights, itself in 8 bits; what is no linear layer bf16.
_BYTES_IN_4_BITS, _BYTES_BESIDE = 0.516, 2
# Per token and layer, in units of the hidden width: inputs of norms, q, k, v, attention output,
# and three times the MLP's width (gate, up, product), about 8/3 x hidden each.
_ACTIVATIONS_PER_TOKEN = 6 + 3 * 8 / 3
# On the host kernels keep more than those of a GPU: activations 1.7 times as much. Between tensors
# of ever other lengths the allocator holds as much again as half of what is used, and the process
# itself is Python, torch and Ray (measured, benchmarks/RESULTS.md).
_HOST_ACTIVATIONS, _HOST_HOLES = 1.7, 0.55
_PROCESS_BYTES = 0.5 * _GIB


def plan_lines(config: ORPOConfig) -> list[str]:
    """Lines with the effective batch size, the number of steps and the memory per worker.

    Raises:
        ConfigError: for a model that brings code of its own.
        DataError: for files that are not there.
    """
    train, data = config.train, config.data
    made_of = (
        "global_batch_size"
        if train.global_batch_size
        else f"{train.per_device_train_batch_size} a worker and pass x "
        f"{train.gradient_accumulation_steps} passes x {config.ray.max_workers} workers"
    )
    lines = [f"effective batch: {config.pairs_per_step} pairs a step ({made_of})"]
    if data.train_files is None:
        lines.append("steps: the demo's pairs and model are made when the run starts")
    else:
        named = [entry if isinstance(entry, str) else entry.path for entry in data.train_files]
        n_rows = sum(map(count_rows, find_files(named)))
        steps = config.total_steps(-(-n_rows // config.pairs_per_step))
        lines.append(
            f"steps: {steps}, from at most {n_rows} pairs (refused rows are not known yet)"
        )
    if config.model.model_name_or_path is not None:
        lines += _memory_lines(config, config.model.model_name_or_path)
        lines += bf16_hint(config, _cpu_capabilities(config))
    return lines


def _cpu_capabilities(config: ORPOConfig) -> Mapping[str, Any]:
    """What this machine's CPU has, by name; nothing where a GPU is used or torch cannot tell."""
    import torch

    if config.ray.use_gpu is None and torch.cuda.is_available():
        return {}
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return found


def bf16_hint(config: ORPOConfig, cpu: Mapping[str, Any]) -> list[str]:
    """A line where a run on CPUs would compute in fp32, although they have units for bfloat16.

    Those are AMX: with the vector instructions (avx512_bf16) alone, bfloat16 is slower than fp32.

    Args:
        config: of the run.
        cpu: what the CPU has, by names of torch.
    """
    if config.train.bf16 is not None or config.ray.use_gpu or not cpu.get("amx_bf16"):
        return []
    return [
        "hint: bf16 is off on CPUs unless it is set, and this one has units for it (amx_bf16): "
        "bf16=true was 1.8 times as fast on such a CPU"
    ]


def _memory_lines(config: ORPOConfig, model_path: str) -> list[str]:
    """Memory per worker for its shard, one microbatch, and one chunk of logits."""
    import torch

    source = ModelSource.from_config(config.model, model_path)
    try:
        model_config = load_model_config(source)
        with torch.device("meta"):
            model = empty_model(source, model_config)
    except UnsupportedModelError as error:
        raise ConfigError([f"model_name_or_path: {error}"]) from error
    on_gpu = bool(config.ray.use_gpu) or torch.cuda.is_available()
    bf16 = on_gpu if config.train.bf16 is None else config.train.bf16
    value_bytes = 2 if bf16 else 4
    state, state_text = _state(config, model, value_bytes)
    text_config = model_config.get_text_config()
    layers, width = text_config.num_hidden_layers, text_config.hidden_size
    kept_layers = 1 if config.train.gradient_checkpointing else layers
    per_token = kept_layers * _ACTIVATIONS_PER_TOKEN + (layers - kept_layers)
    # No row is longer than a worker's pairs, whose prompt and answers are two sequences at most.
    own_pairs = -(-config.pairs_per_step // config.ray.max_workers)
    tokens = min(config.microbatch_tokens, own_pairs * 2 * config.data.max_length)
    activations = tokens * per_token * width * value_bytes * (1 if on_gpu else _HOST_ACTIVATIONS)
    positions = min(config.train.head_chunk(text_config.vocab_size, on_gpu), tokens)
    logits = 4 * positions * text_config.vocab_size
    gathered = _gathered(config, model, layers, value_bytes)
    parts = [
        (state, state_text),
        (gathered, "weights and gradients as gathered"),
        (activations, f"activations of {tokens} tokens"),
        (2 * logits, f"logits of {positions} positions and their gradient"),
    ]
    if not on_gpu:
        used = sum(part for part, _ in parts)
        parts += [
            (_HOST_HOLES * used, "what the allocator holds between them"),
            (_PROCESS_BYTES, "the process itself"),
        ]
    total = sum(part for part, _ in parts)
    shown = " + ".join(f"{part / _GIB:.2f} {text}" for part, text in parts if part)
    return [f"memory a worker: about {total / _GIB:.2f} GiB = {shown}"]


def _gathered(config: ORPOConfig, model: Any, layers: int, value_bytes: int) -> float:
    """Bytes of weights and gradients in the dtype of computation: of two layers at a time.

    One worker has those of the whole model, and none in fp32 or of a frozen base, which is in that
    dtype already.
    """
    lora, alone = config.model.lora_r, config.ray.max_workers == 1
    if config.model.load_in_4bit or (alone and (value_bytes == 4 or lora)):
        return 0.0
    n_parameters: int = sum(p.numel() for p in model.parameters())
    share = 1.0 if alone else min(1.0, 2 / layers)
    return n_parameters * share * (value_bytes + (0 if lora else value_bytes))


def _state(config: ORPOConfig, model: Any, value_bytes: int) -> tuple[float, str]:
    """Bytes per worker of weights, gradients and optimizer state, with their derivation."""
    from torch import nn

    n_parameters, workers = sum(p.numel() for p in model.parameters()), config.ray.max_workers
    if config.model.load_in_4bit:
        head = model.get_output_embeddings()
        linear = (m for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
        n_linear = sum(module.weight.numel() for module in linear)
        state = n_linear * _BYTES_IN_4_BITS + (n_parameters - n_linear) * _BYTES_BESIDE
        return (
            state,
            f"weights ({n_linear:,} of {n_parameters:,} parameters in 4 bits, all on every worker; "
            "no adapters)",
        )
    if config.model.lora_r:
        return (
            n_parameters * value_bytes / workers,
            f"weights ({n_parameters:,} parameters x {value_bytes} bytes / {workers} workers; "
            "no adapters)",
        )
    optim = config.train.optim
    held = sum(state_bytes(optim, p.shape) for p in model.parameters())
    if is_whole_everywhere(optim):
        held *= workers
    each = _BYTES_PER_PARAMETER + held / n_parameters
    return (
        n_parameters * each / workers,
        f"weights, gradients and {_OPTIMIZERS[optim]} ({n_parameters:,} parameters x {each:.4g} "
        f"bytes / {workers} workers)",
    )
