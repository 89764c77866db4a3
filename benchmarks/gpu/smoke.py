"""Three steps with every setting: the losses agree, and a checkpoint comes back with its bytes."""

import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from orpo_ray.dataset.stream import StepBatch
from orpo_ray.storage.folder import Folder
from orpo_ray.training.checkpoint.saver import CheckpointSaver, Progress, load_checkpoint
from orpo_ray.training.step import TrainState
from rank import built, folder_of, losses, start_rank, stream
from results import CUDA, DRY, attempt, record

# Unless a setting speaks against it, layers are compiled on a GPU.
SETTINGS: tuple[dict[str, Any], ...] = (
    {"torch_compile": False},
    {"torch_compile": False, "gradient_checkpointing": True},
    {"cpu_offload": True},
    {"attention_kernel": "sdpa"},
    {"torch_compile": False, "use_liger_kernel": False},
    {"load_in_4bit": True, "lora_r": 8},
    {"bf16": False},
    {"full_determinism": True},
    {"optim": "adafactor", "torch_compile": False},
    {"lora_r": 8},
    {},
    {"gradient_checkpointing": True},
    {"attention_kernel": "flex"},
    {"optim": "adamw_8bit", "torch_compile": False},
)
# What computes on a CPU as `{}` does, or not at all.
ON_GPUS_ONLY = {"cpu_offload", "use_liger_kernel", "load_in_4bit", "attention_kernel"}
ON_GPUS_ONLY |= {"full_determinism"}


def main() -> None:
    """Record the losses in fp32, then how far those of each setting are from them."""
    start_rank()
    folder = folder_of("5m")
    batches = list(stream(folder, 4 if DRY else 16).batches(0, 3))
    plain, _ = built(folder, bf16=False, attention_kernel="sdpa")
    expected = losses(plain, batches)
    record("smoke", setting="fp32, sdpa", losses=expected, attention=plain.model.attention_text)
    for setting in SETTINGS:
        if DRY and ON_GPUS_ONLY & setting.keys():
            continue
        if DRY and setting.get("torch_compile") is False and "optim" not in setting:
            continue
        if DRY and setting.get("optim") == "adamw_8bit" and find_spec("torchao") is None:
            continue
        with attempt("smoke", setting=str(setting)):
            started = time.perf_counter()
            state, _ = built(folder, **setting)
            found = losses(state, batches)
            record(
                "smoke",
                setting=str(setting),
                attention=state.model.attention_text,
                compiled=state.model.is_compiled,
                liger=state.model.has_liger,
                difference=max(abs(a - b) / b for a, b in zip(found, expected, strict=True)),
                seconds=time.perf_counter() - started,
            )
            if not setting:
                _synchronizations(state, batches[0])
            if not setting or "optim" in setting:
                _checkpoint(state, folder, setting)
    dist.destroy_process_group()


def _synchronizations(state: TrainState, batch: StepBatch) -> None:
    """Where a step waits for the device, as torch reports it."""
    if not CUDA:
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        losses(state, [batch])
        torch.cuda.set_sync_debug_mode("default")
    found = [w for w in caught if "synchroniz" in str(w.message)]
    places = [f"{Path(w.filename).name}:{w.lineno}" for w in found]
    record("waits", places={place: places.count(place) for place in sorted(set(places))})


def _checkpoint(state: TrainState, folder: Path, setting: dict[str, Any]) -> None:
    saver = CheckpointSaver(Folder.at(folder), keep=2)
    progress = Progress(1, 32, ((0.0,),), 0, 0)
    saver.start(state.model, state.optimizer, progress, {"step": 1})
    problem = saver.finish()
    before = [p.detach().clone() for p in state.model.parameters()]
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.zero_()
    load_checkpoint(Folder.at(folder), 1, state.model, state.optimizer)
    after = [p.detach() for p in state.model.parameters()]
    equal = all(map(torch.equal, before, after))
    record("smoke", setting=f"checkpoint {setting}", problem=problem, bytes_equal=equal)


if __name__ == "__main__":
    main()
