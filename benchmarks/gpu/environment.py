"""What the machine is: versions, rates of products and copies, launches, process groups."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from results import CUDA, DEVICE, DRY, attempt, median_s, print_machine, record, wait

PACKAGES = (
    *("torch", "triton", "nvidia-cudnn-cu13", "nvidia-nccl-cu13", "numpy", "pyarrow", "datasets"),
    *("transformers", "tokenizers", "safetensors", "huggingface_hub", "accelerate", "peft", "trl"),
    *("pydantic", "liger-kernel", "bitsandbytes", "pytest", "pytest-xdist"),
)
TOOLS = ("git", "gcc", "nvcc", "nvidia-smi")


def main() -> None:
    """Record each property; an error in one leaves the others."""
    print_machine()
    _versions()
    with attempt("matmul"):
        _products()
    with attempt("copies"):
        _copies()
    with attempt("launches"):
        _launches()
    with attempt("process groups"):
        _process_groups()
    if CUDA:
        _expandable_segments()


def _versions() -> None:
    versions: dict[str, Any] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    tools = {name: shutil.which(name) is not None for name in TOOLS}
    record(
        "versions",
        commit=os.environ["COMMIT"],
        python=platform.python_version(),
        cores=os.cpu_count(),
        **versions,
        **tools,
    )
    if tools["nvidia-smi"]:
        query = "name,driver_version,memory.total,clocks.sm,power.limit"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        record("gpu", text=found.stdout.strip())


def _products() -> None:
    """TFLOP/s of a large product, best and sustained, and of the products of a 1B step."""
    n, repeats = (512, 4) if DRY else (8192, 600)
    action = _product(n, n, n)
    best = 2 * n**3 / median_s(action) / 1e12
    wait()
    started = time.perf_counter()
    for _ in range(repeats):
        action()
    wait()
    sustained = 2 * n**3 * repeats / (time.perf_counter() - started) / 1e12
    record("matmul", n=n, tflops=best, sustained_tflops=sustained)
    tokens, chunk = (256, 64) if DRY else (6144, 1024)
    for name, shape in {
        "gate and up": (tokens, 2048, 8192),
        "down": (tokens, 8192, 2048),
        "query": (tokens, 2048, 2048),
        "key": (tokens, 2048, 512),
        "weight gradient": (8192, tokens, 2048),
        "head": (chunk, 2048, 16_384),
        "head, hidden gradient": (chunk, 16_384, 2048),
        "head, weight gradient": (16_384, chunk, 2048),
        "head of 4096": (4 * chunk, 2048, 16_384),
        "head of 4096, hidden gradient": (4 * chunk, 16_384, 2048),
    }.items():
        m, k, n = shape
        rate = 2 * m * k * n / median_s(_product(*shape, transposed=True), 3 if DRY else 20) / 1e12
        record("matmul", what=name, shape=shape, tflops=rate)


def _product(m: int, k: int, n: int, transposed: bool = False) -> Callable[[], Tensor]:
    """A product of random numbers: a GPU multiplies constant ones faster."""
    numbers = torch.Generator(DEVICE).manual_seed(0)
    dtype = torch.float32 if DRY else torch.bfloat16
    left = torch.randn(m, k, device=DEVICE, generator=numbers).to(dtype)
    shape = (n, k) if transposed else (k, n)
    right = torch.randn(*shape, device=DEVICE, generator=numbers).to(dtype)
    return lambda: left @ (right.T if transposed else right)


def _copies() -> None:
    """GB/s on the device (bytes read and written), and between device and host."""
    n = 1 << (20 if DRY else 30)
    source = torch.randn(n, device=DEVICE)
    target = torch.empty_like(source)
    rates = {"device": 8 * n / median_s(lambda: target.copy_(source)) / 1e9}
    source = source[: n // 4].clone()
    if CUDA:
        pinned = torch.empty(n // 4, pin_memory=True)
        pageable = torch.zeros(n // 4)
        rates |= {
            "to the host, pinned": n / median_s(lambda: pinned.copy_(source), 3, 1) / 1e9,
            "to the host, pageable": n / median_s(lambda: pageable.copy_(source), 3, 1) / 1e9,
            "to the host, new memory": n / median_s(lambda: source.cpu(), 3, 1) / 1e9,
        }
    record("copies", gb_per_s=rates)


def _launches() -> None:
    """Microseconds of the host for a launch."""
    small = torch.zeros(64, device=DEVICE)

    def many() -> None:
        for _ in range(2000):
            small.add_(1.0)

    record("launches", us_each=median_s(many, 5) / 2000 * 1e6)


def _process_groups() -> None:
    """One rank of NCCL with gloo beside it, as a training worker has them; gloo on CPUs."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    started = time.perf_counter()
    backend = "cpu:gloo,cuda:nccl" if CUDA else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    dist.all_reduce(torch.ones(4, device=DEVICE))
    group = dist.new_group(backend="gloo")
    parts: list[Any] = [None]
    dist.all_gather_object(parts, {"a": 1}, group=group)
    wait()
    record("process groups", backend=backend, seconds=time.perf_counter() - started)
    dist.destroy_process_group()


def _expandable_segments() -> None:
    """Whether the allocator takes the setting that training workers get."""
    code = "import torch; [torch.ones(1 << n, device='cuda') for n in range(10, 30)]"
    setting = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | setting,
        capture_output=True,
        text=True,
        check=False,
    )
    record("expandable segments", rc=done.returncode, stderr=done.stderr.strip()[-300:])


if __name__ == "__main__":
    main()
