"""Sharded checkpoints, written asynchronously; in training workers."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from orpo_ray.runs.files import WRITTEN_BY_WORKERS
from orpo_ray.runs.manifest import (
    checkpoint,
    checkpoints,
    fingerprint,
    keep_newest,
    write_manifest,
)
from orpo_ray.storage.files import first_line, one_line, read_json, write_atomic
from orpo_ray.storage.folder import Folder
from orpo_ray.training.checkpoint.staging import Staging

# Frozen weights are loaded from the base model again.
_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)
_PROGRESS = "state.json"


@dataclass(frozen=True)
class Progress:
    """What a checkpoint holds besides tensors.

    Args:
        step: number of optimizer steps done.
        global_batch_pairs: pairs per step; the data order depends on it.
        sums: metric sums of every rank since the last logged step.
        logged_steps: steps that `sums` covers.
        skipped_rows: number of rows left out so far by on_nonfinite=skip.
    """

    step: int
    global_batch_pairs: int
    sums: tuple[tuple[float, ...], ...]
    logged_steps: int
    skipped_rows: int


class CheckpointSaver:
    """Writes one checkpoint at a time in a background thread; every rank makes the same calls.

    Its collectives have a process group of their own, so they do not mix with those of training.

    Args:
        run: the run directory.
        keep: number of committed checkpoints to keep; None: all.
        keeps_memory: of `Staging`; None: on GPUs.
    """

    def __init__(self, run: Folder, keep: int | None, keeps_memory: bool | None = None) -> None:
        self._run = run
        self._keep = keep
        self._group = dist.new_group(backend="gloo")
        self._staging = Staging(torch.cuda.is_available() if keeps_memory is None else keeps_memory)
        self._thread = ThreadPoolExecutor(1, "orpo-save", initializer=_on_this_gpu())
        self._allocation: Future[None] | None = None
        self._pending: Future[str | None] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a save is in progress; the same on every rank."""
        return self._pending is not None

    @property
    def is_ready(self) -> bool:
        """Whether `finish` would return at once on this rank."""
        return self._pending is None or self._pending.done()

    @property
    def is_prepared(self) -> bool:
        """Whether what `prepare` began is done on this rank."""
        return self._allocation is None or self._allocation.done()

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Allocate the host memory of all saves in the background, where it is kept.

        Pinning gigabytes takes seconds, for which the first save would stall a step. The memory is
        known once the optimizer has a state: call this after the first step. Later calls do
        nothing.
        """
        if self._staging.keeps_memory and self._allocation is None:
            tensors = _plain(_tensors(model, optimizer), optimizer)
            self._allocation = self._thread.submit(self._staging.allocate, tensors)

    def start(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        about: Mapping[str, Any],
        problem: str | None = None,
        ranking: Sequence[int] = (),
    ) -> None:
        """Copy the tensors to host memory and write them in the background.

        Args:
            model: sharded over all ranks.
            optimizer: its optimizer.
            progress: stored beside the tensors.
            about: further fields of the manifest.
            problem: why this rank cannot save; no checkpoint is committed then.
            ranking: steps, of which the first that has a checkpoint keeps it.
        """
        if self._pending is not None:
            raise AssertionError("a save is in progress")
        staged: dict[str, Any] = {}
        try:
            if self._allocation is not None:
                wait([self._allocation])  # if it failed, the copy tries once more
            staged = self._staging.copy(_plain(_tensors(model, optimizer), optimizer))
        except RuntimeError as error:  # no memory left on the host, or none to be pinned
            problem = problem or _reason(error)
        keep = partial(keep_newest, self._run, self._keep, tuple(ranking))
        self._pending = self._thread.submit(
            self._write, staged, progress, dict(about), problem, keep
        )

    def finish(self) -> str | None:
        """Wait for the save in progress.

        Returns:
            None if it was committed, else why not; the same on every rank.
        """
        if self._pending is None:
            raise AssertionError("no save is in progress")
        pending, self._pending = self._pending, None
        return pending.result()

    def _write(
        self,
        staged: Any,
        progress: Progress,
        about: dict[str, Any],
        problem: str | None,
        keep: Callable[[], None],
    ) -> str | None:
        """Write, verify and commit, then delete old checkpoints; in the thread."""
        rank = dist.get_rank()
        folder = checkpoint(self._run, progress.step)
        files: dict[str, Any] = {}
        try:
            if rank == 0:
                folder.remove()  # a torn save of the same step
                folder.path.mkdir(parents=True)
                text = json.dumps(dataclasses.asdict(progress), indent=1)
                write_atomic(folder.path / _PROGRESS, text)
        except OSError as error:
            problem = one_line(error)
        problem = self._first_problem(problem)
        if problem is None:
            try:
                state_dict_saver.save(
                    staged, checkpoint_id=str(folder.path), process_group=self._group
                )
                files = _own_files(folder.path)
                folder.publish(*files)
            except (CheckpointException, OSError) as error:
                problem = _reason(error)
            problem = self._first_problem(problem)
        parts: list[dict[str, Any]] = [{}] * dist.get_world_size()
        dist.all_gather_object(parts, files, group=self._group)
        if rank == 0:
            problem = self._commit(folder, problem, about, parts, keep)
        problem = self._first_problem(problem)
        if problem is None:
            self._forget_others(folder)
        return problem

    def _commit(
        self,
        folder: Folder,
        problem: str | None,
        about: dict[str, Any],
        parts: list[dict[str, Any]],
        keep: Callable[[], None],
    ) -> str | None:
        """Write the manifest, or delete the uncommitted checkpoint; on rank 0."""
        if problem is None:
            try:
                files = {name: entry for part in parts for name, entry in part.items()}
                self._run.publish(*(n for n in WRITTEN_BY_WORKERS if (self._run.path / n).exists()))
                write_manifest(folder, about, files)
            except OSError as error:
                problem = one_line(error)
            else:
                with contextlib.suppress(OSError):  # the next save deletes what remains
                    keep()
        if problem is not None:
            with contextlib.suppress(OSError):
                folder.remove()
        return problem

    def _forget_others(self, folder: Folder) -> None:
        """Leave the tensors of one checkpoint alone on this node's disk."""
        for other in checkpoints(self._run):
            if other != folder:
                other.forget_heavy()

    def _first_problem(self, problem: str | None) -> str | None:
        """The problem of the lowest rank that has one."""
        problems: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem, group=self._group)
        return next((p for p in problems if p is not None), None)


def load_checkpoint(
    run: Folder, step: int, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Progress:
    """Load a verified checkpoint into a sharded model and its optimizer, at any world size.

    The optimizer keeps its own settings, such as weight decay, which the run's config decides.
    """
    directory = _on_this_node(checkpoint(run, step))
    settings = [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]
    tensors = _tensors(model, optimizer)
    state_dict_loader.load(_plain(tensors, optimizer), checkpoint_id=str(directory))
    set_state_dict(
        model,
        optimizer,
        model_state_dict=tensors["model"],
        optim_state_dict=tensors["optimizer"],
        options=_OPTIONS,
    )
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    known = {field.name for field in dataclasses.fields(Progress)}
    content = read_json(directory / _PROGRESS)  # perhaps of a version with more fields
    fields = {name: value for name, value in content.items() if name in known}
    return Progress(**fields | {"sums": tuple(map(tuple, fields["sums"]))})


def load_weights(run: Folder, step: int, model: nn.Module) -> None:
    """Load only the weights of a verified checkpoint into a sharded model."""
    weights = _trained(model, get_model_state_dict(model, options=_OPTIONS))
    directory = _on_this_node(checkpoint(run, step))
    state_dict_loader.load({"model": weights}, checkpoint_id=str(directory))
    set_model_state_dict(model, weights, options=_OPTIONS)


def _on_this_node(folder: Folder) -> Path:
    """Fetch a whole checkpoint to every node; a collective."""
    if folder.url is not None:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            folder.fetch()
        dist.barrier()
    return folder.path


def _on_this_gpu() -> Callable[[], None] | None:
    """An initializer that sets a thread's GPU and gives it a side stream.

    DCP synchronizes with the thread's current stream every few megabytes; on the default stream the
    save would serialize with the training steps.
    """
    if not torch.cuda.is_initialized():
        return None
    device = torch.cuda.current_device()

    def begin() -> None:
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream(device))

    return begin


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Sharded state dicts by parameter names, which any world size can load."""
    model_state, optimizer_state = get_state_dict(model, optimizer, options=_OPTIONS)
    return {"model": _trained(model, model_state), "optimizer": optimizer_state}


def _plain(tensors: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The same tensors as a checkpoint has them, in the same memory."""
    plain_state = getattr(optimizer, "plain_state", None)  # of AdamW8bit
    return tensors | {"optimizer": plain_state(tensors["optimizer"])} if plain_state else tensors


def _trained(model: nn.Module, weights: dict[str, Any]) -> dict[str, Any]:
    """A state dict without frozen weights.

    `ignore_frozen_params` omits a frozen tied weight under one of its names only.
    """
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            weights.pop(name, None)
    return weights


def _own_files(directory: Path) -> dict[str, Any]:
    """Fingerprints of the files of this rank, read back; rank 0 has those of no rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return {
        path.name: fingerprint(path)
        for path in sorted(directory.iterdir())
        if _writer(path.name, world_size) == rank
    }


def _writer(file_name: str, world_size: int) -> int:
    """The rank that wrote a file: DCP names its shards `__<rank>_<part>.distcp`."""
    rank = file_name.removeprefix("__").split("_")[0]
    return int(rank) if file_name.startswith("__") and int(rank) < world_size else 0


def _reason(error: BaseException) -> str:
    """The error of the first rank that failed, on one line."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return first_line(f"{type(error).__name__}: {error}")
