"""Checkpoints that exist only once their manifest does, and verify before they are read.

Runs in training workers; `newest_checkpoint` also on the driver.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

# What is frozen is the base model's, and read from there again.
_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)
MANIFEST = "MANIFEST.json"
FOLDER = "checkpoints"


@dataclass(frozen=True)
class TrainState:
    """Where a run stands besides its tensors.

    Args:
        step: optimizer steps done.
        global_batch_pairs: pairs of a step; the order is counted in them.
        scheduler: state of the learning-rate schedule.
        sums: metric sums since the last logged step, over all workers.
        logged_steps: steps that `sums` covers.
    """

    step: int
    global_batch_pairs: int
    scheduler: dict[str, Any]
    sums: tuple[float, ...]
    logged_steps: int


def checkpoint_name(step: int) -> str:
    """Path of a checkpoint below its run directory."""
    return f"{FOLDER}/step-{step:08d}"


def save_checkpoint(
    run_directory: str, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState
) -> str:
    """Write a checkpoint from all ranks; it is committed when this returns.

    Returns:
        Its name below the run directory.
    """
    name = checkpoint_name(state.step)
    directory = Path(run_directory) / name
    if dist.get_rank() == 0 and directory.exists():
        shutil.rmtree(directory)  # a torn save of the same step
    dist.barrier()
    state_dict_saver.save(_tensors(model, optimizer), checkpoint_id=str(directory))
    if dist.get_rank() == 0:
        _write(directory / "state.json", dataclasses.asdict(state))
    dist.barrier()
    # Each rank reads back what it wrote; rank 0 what belongs to nobody.
    rank, world_size = dist.get_rank(), dist.get_world_size()
    own = {
        path.name: _fingerprint(path)
        for path in sorted(directory.iterdir())
        if _writer(path.name, world_size) == rank
    }
    parts: list[dict[str, Any]] = [{}] * world_size
    dist.all_gather_object(parts, own)
    if rank == 0:
        files = {name: entry for part in parts for name, entry in part.items()}
        manifest = {"step": state.step, "world_size": world_size, "files": files}
        _write(directory / MANIFEST, manifest)
    dist.barrier()
    return name


def load_checkpoint(
    run_directory: str, step: int, model: nn.Module, optimizer: torch.optim.Optimizer
) -> TrainState:
    """Read the tensors of a verified checkpoint into a sharded model and its optimizer.

    The number of ranks may differ from the one that wrote it.
    """
    directory = Path(run_directory) / checkpoint_name(step)
    tensors = _tensors(model, optimizer)
    state_dict_loader.load(tensors, checkpoint_id=str(directory))
    set_state_dict(
        model,
        optimizer,
        model_state_dict=tensors["model"],
        optim_state_dict=tensors["optimizer"],
        options=_OPTIONS,
    )
    fields = json.loads((directory / "state.json").read_text())
    return TrainState(**fields | {"sums": tuple(fields["sums"])})


def newest_checkpoint(run_directory: str, notice: Callable[[str], None]) -> int | None:
    """The step of the newest checkpoint that verifies, or None.

    Args:
        run_directory: of the run.
        notice: told of every checkpoint passed over, and why.
    """
    for directory in sorted(Path(run_directory, FOLDER).glob("step-*"), reverse=True):
        damage = find_damage(directory)
        if damage is None:
            return int(directory.name.removeprefix("step-"))
        notice(f"checkpoint {directory.name} passed over: {damage}")
    return None


def find_damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint's files by its manifest, or None."""
    try:
        files = json.loads((directory / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so its save never ended"
    except (ValueError, KeyError, TypeError):
        return f"its {MANIFEST} is damaged"
    for name, entry in files.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        if _fingerprint(path) != entry:
            return f"{name} does not match its checksum"
    return None


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Sharded state dicts; parameters carry names, so any number of ranks can read them."""
    model_state, optimizer_state = get_state_dict(model, optimizer, options=_OPTIONS)
    # The options leave out a frozen weight under one of its names only, where two are tied.
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            model_state.pop(name, None)
    return {"model": model_state, "optimizer": optimizer_state}


def _writer(file_name: str, world_size: int) -> int:
    """The rank that wrote a file: DCP names its shards `__<rank>_<part>.distcp`."""
    rank = file_name.removeprefix("__").split("_")[0]
    return int(rank) if file_name.startswith("__") and int(rank) < world_size else 0


def _fingerprint(path: Path) -> dict[str, Any]:
    """Size and XXH3-128 of a file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"bytes": path.stat().st_size, "xxh3_128": digest.hexdigest()}


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that the file is whole or absent, and on disk."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
