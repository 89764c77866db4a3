"""Speed and memory of a training step, and where its time goes: `speed.py SIZE [lora]`."""

import gc
import gzip
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig

from orpo_ray.dataset.stream import StepBatch
from orpo_ray.models.microbatch import Microbatch
from orpo_ray.training.flops import Work, matmul_rate
from orpo_ray.training.step import (
    TrainState,
    adamw_step,
    gradient_norm,
    loss_scale,
    train_step,
)
from rank import built, built_with_lora, folder_of, start_rank, stream, zeros
from results import CUDA, DEVICE, DRY, OUT, attempt, peak_gib, record, seconds_left, wait

HALF = torch.bfloat16 if CUDA else torch.float32


@dataclass(frozen=True)
class Variant:
    """One way to take the same steps.

    Args:
        name: in the results.
        settings: of the config a model is built for.
        by_layer: whether every layer is an FSDP unit, as it is on several ranks.
        batch: pairs a step.
        chunk_tokens: positions that the head projects at once; 4096 is the default on GPUs.
        deterministic: whether torch takes only kernels that always give the same bytes.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    by_layer: bool = False
    batch: int = 32
    chunk_tokens: int = 4096
    deterministic: bool = False


LIGER = {"torch_compile": False}
NEITHER = LIGER | {"use_liger_kernel": False}
COMPILED = {"torch_compile": True}  # as it is, where nothing is set
VARIANTS = (
    Variant("compiled", COMPILED),
    Variant("compiled, 128 pairs", COMPILED, batch=128),
    Variant("compiled, units by layer", COMPILED, by_layer=True),
    Variant("Liger", LIGER),
    Variant("Liger, again", LIGER),  # the first also warms caches that later ones find warm
    Variant("Liger, 128 pairs", LIGER, batch=128),
    Variant("Liger, chunks of 1024", LIGER, chunk_tokens=1024),
    Variant("Liger, deterministic", LIGER, deterministic=True),
    Variant("Liger, units by layer", LIGER, by_layer=True),
    Variant("neither", NEITHER),
)
IN_DRY_RUNS = ("compiled", "neither")
PROFILED = ("compiled", "Liger", "LoRA")
# Kernels by words in their names, the first kind that has one.
KINDS = {
    "products": ("gemm", "nvjet", "cutlass", "xmma", "addmm", "::mm"),
    "attention": ("flash", "varlen", "fmha", "cudnn"),
    "optimizer and norm": ("multi_tensor", "fused_adam", "foreach", "lpnorm"),
    "copies and casts": ("copy", "memcpy", "chunk_cat", "catarray", "memset"),
    "gathers": ("index", "gather", "scatter", "embedding"),
    "sums": ("reduce", "softmax", "::sum"),
}


def main(size: str, which: str = "plain") -> None:
    """Measure the variants, each model built once."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product
    start_rank()
    peak = matmul_rate(DEVICE, HALF)
    record("ours", size=size, matmul_tflops=peak / 1e12)
    if which == "lora":
        _lora(size, peak)
    else:
        _variants(size, peak)
    dist.destroy_process_group()


def _variants(size: str, peak: float) -> None:
    folder = folder_of(size)
    variants = [v for v in VARIANTS if not DRY or v.name in IN_DRY_RUNS]
    groups = groupby(variants, key=lambda variant: (variant.settings, variant.by_layer))
    for (settings, by_layer), chosen in groups:
        if seconds_left() < 15:
            record("ours", size=size, settings=str(settings), left_out=True)
            continue
        with attempt("ours", size=size, settings=str(settings)):
            started = time.perf_counter()
            state, _ = built(folder, by_layer, **settings)
            record("ours", size=size, built_s=time.perf_counter() - started)
            for variant in chosen:
                if seconds_left() < 10:
                    record("ours", size=size, variant=variant.name, left_out=True)
                    continue
                with attempt("ours", size=size, variant=variant.name):
                    _measure(state, folder, size, variant, peak)
        state = None  # type: ignore[assignment]
        gc.collect()  # FSDP's hooks and modules refer to one another
        if CUDA:
            torch.cuda.empty_cache()


def _lora(size: str, peak: float) -> None:
    """LoRA on a base in bf16 of Llama 3.1 8B's shape, over the pairs of the 5M model's words."""
    folder = folder_of("5m")
    shape = {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256}
    if DRY:
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 16_384}
    if CUDA and torch.cuda.mem_get_info()[0] < 40 << 30:
        record("ours", size=size, left_out="40 GiB are needed")
        return
    with attempt("ours", size=size, variant="LoRA"):
        started = time.perf_counter()
        state = built_with_lora(LlamaConfig(**shape, **heads))
        record("ours", size=size, built_s=time.perf_counter() - started)
        for batch in (32, 128):
            name = "LoRA" if batch == 32 else f"LoRA, {batch} pairs"
            _measure(state, folder, size, Variant(name, batch=batch, chunk_tokens=2048), peak)


def _measure(state: TrainState, folder: Path, size: str, variant: Variant, peak: float) -> None:
    batch = 4 if DRY else variant.batch
    n_warmup, n_steps = (1, 1) if DRY else (3, 8 if batch < 100 else 4)
    feed = stream(folder, batch, variant.chunk_tokens)
    batches = list(feed.batches(0, n_warmup + n_steps))
    torch.use_deterministic_algorithms(variant.deterministic)
    started = time.perf_counter()
    sums = zeros()
    for step in batches[:n_warmup]:
        train_step(state, step, sums)
    wait()
    warmup_s = time.perf_counter() - started
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    timed, times = batches[n_warmup:], []
    started = time.perf_counter()
    for step in timed:
        begun = time.perf_counter()
        train_step(state, step, sums)
        times.append(time.perf_counter() - begun)
    wait()
    seconds = time.perf_counter() - started
    torch.use_deterministic_algorithms(False)
    work = Work.from_model(state.model.causal_lm)
    flops = sum(work.flops(row) for step in timed for row in step.rows)
    n_tokens = sum(step.n_tokens for step in timed)
    record(
        "ours",
        size=size,
        variant=variant.name,
        attention=state.model.attention_text,
        liger=state.model.has_liger,
        step_ms=1e3 * seconds / n_steps,
        median_step_ms=1e3 * statistics.median(times),
        tokens_a_step=n_tokens / n_steps,
        tokens_per_s=n_tokens / seconds,
        pairs_per_s=batch * n_steps / seconds,
        mfu=flops / seconds / peak,
        peak_gib=peak_gib(),
        warmup_s=warmup_s,
    )
    if variant.name in PROFILED:
        _phases(state, timed[0], size, variant.name)
        _profile(state, timed[:2], size, variant.name, 1e3 * seconds / n_steps)


def _phases(state: TrainState, step: StepBatch, size: str, name: str) -> None:
    """Milliseconds of the host, and of host and device, in each part of a step.

    Where the host takes as long as both, the device waits for launches.
    """
    scale, row = loss_scale(step, state.objective), step.rows[0]
    made: dict[str, Any] = {}

    def place() -> None:
        made["batch"] = Microbatch(row, DEVICE)

    def forward() -> None:
        made["output"] = state.model(made["batch"], scale)

    def norm() -> None:
        made["norm"] = gradient_norm(state.model)

    phases: dict[str, Callable[[], Any]] = {
        "microbatch": place,
        "forward": forward,
        "backward": lambda: made["output"].loss.backward(),
        "norm": norm,
        "optimizer": lambda: adamw_step(state.optimizer, made["norm"], state.max_grad_norm),
    }
    host: dict[str, list[float]] = {phase: [] for phase in phases}
    both: dict[str, list[float]] = {phase: [] for phase in phases}
    for _ in range(1 if DRY else 4):
        state.optimizer.zero_grad(set_to_none=True)
        for phase, action in phases.items():
            wait()
            started = time.perf_counter()
            action()
            host[phase].append(time.perf_counter() - started)
            wait()
            both[phase].append(time.perf_counter() - started)
    record(
        "phases",
        size=size,
        variant=name,
        host_ms={phase: round(1e3 * min(times), 2) for phase, times in host.items()},
        host_and_device_ms={phase: round(1e3 * min(times), 2) for phase, times in both.items()},
    )


def _profile(
    state: TrainState, steps: Sequence[StepBatch], size: str, name: str, step_ms: float
) -> None:
    """The kernels that take most of a step, by kind and the first ten by name."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] * CUDA
    sums = zeros()
    with torch.profiler.profile(activities=activities) as profiled:
        for step in steps:
            train_step(state, step, sums)
        wait()
    kind = torch.autograd.DeviceType.CUDA if CUDA else torch.autograd.DeviceType.CPU
    events = [
        event
        for event in profiled.key_averages()
        if event.device_type == kind and not event.is_user_annotation  # as FSDP's, around kernels
    ]
    attribute = "self_device_time_total" if CUDA else "self_cpu_time_total"
    times = {event.key: getattr(event, attribute) / 1e3 / len(steps) for event in events}
    calls = {event.key: event.count / len(steps) for event in events}
    by_kind: dict[str, float] = {}
    for key, ms in times.items():
        by_kind[_kind(key)] = by_kind.get(_kind(key), 0.0) + ms
    record(
        "profile",
        size=size,
        variant=name,
        device_ms=sum(times.values()),
        busy=sum(times.values()) / step_ms,
        kernels=sum(calls.values()),
        kinds_ms={kind: round(ms, 2) for kind, ms in _falling(by_kind)},
    )
    for key, ms in _falling(times)[:10]:
        record("kernel", size=size, variant=name, kernel=key[:80], ms=ms, calls=calls[key])
    if name in ("compiled", "Liger") and size == "1b":
        _write_trace(profiled, f"{size}-{name}")


def _kind(kernel: str) -> str:
    named = (kind for kind, words in KINDS.items() if any(w in kernel.lower() for w in words))
    return next(named, "elementwise")


def _falling(times: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(times.items(), key=lambda item: -item[1])


def _write_trace(profiled: torch.profiler.profile, name: str) -> None:
    """A timeline of two steps, where it is not too large to be fetched."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiled.export_chrome_trace(file.name)
        packed = gzip.compress(Path(file.name).read_bytes(), 6)
    if len(packed) < 15 << 20:
        (OUT / f"trace-{name}.json.gz").write_bytes(packed)


if __name__ == "__main__":
    main(*sys.argv[1:])
