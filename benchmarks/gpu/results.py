"""What the parts of the GPU check share: the results file, time left, and timing on a device."""

import json
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

DRY = bool(os.environ.get("DRY_RUN"))
DEVICE = torch.device("cpu" if DRY else "cuda")
CUDA = DEVICE.type == "cuda"
OUT = Path(os.environ["OUT"])


def print_machine() -> None:
    """The line that every part begins with: card, versions and commit."""
    card = torch.cuda.get_device_name() if CUDA else f"CPU, {os.cpu_count()} cores"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{card}; {versions}; commit {os.environ['COMMIT']}", flush=True)


def record(part: str, **values: Any) -> None:
    """Append a line to results.jsonl, so that it is there whatever comes after it."""
    line = {"part": part, "at_s": round(time.time() - float(os.environ["STARTED"]), 1)} | values
    with (OUT / "results.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(part, values, flush=True)


def seconds_left() -> float:
    """Seconds until this part is ended by its limit."""
    return float(os.environ["ENDS"]) - time.time()


@contextmanager
def attempt(part: str, **case: Any) -> Iterator[None]:
    """Record an exception as the result of a case, and continue with the next one."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        record(part, **case, error=f"{type(error).__name__}: {error}"[:300])


def wait() -> None:
    """Synchronize with the device."""
    if CUDA:
        torch.cuda.synchronize()


def peak_gib() -> float:
    """The most memory allocated since the last reset; 0 on CPUs."""
    return torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0


def median_s(action: Callable[[], Any], tries: int = 20, warmup: int = 3) -> float:
    """Median seconds of an action, synchronized before and after each try."""
    for _ in range(warmup):
        action()
    times = []
    for _ in range(tries):
        wait()
        started = time.perf_counter()
        action()
        wait()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
