"""Host copies of a state dict, written to disk while training continues; in training workers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor


class Staging:
    """Copies a state dict to host memory.

    On GPUs that memory is pinned, and allocating it takes many times as long as the copy: it is
    kept for the next state dict. On the host it would be a second copy of all weights, and is
    released with the copy.

    Args:
        keeps_memory: whether the copies of all state dicts share memory, so that each ends the
            one before.
    """

    def __init__(self, keeps_memory: bool) -> None:
        self.keeps_memory = keeps_memory
        self._options = StagingOptions(
            use_pinned_memory=keeps_memory and torch.cuda.is_available(),
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
        self._stager: DefaultStager | None = None
        self._copy: dict[str, Any] | None = None

    def allocate(self, tensors: dict[str, Any]) -> None:
        """Allocate the memory that is kept, for state dicts like this one.

        It may run in a thread beside training steps.
        """
        self._copy = None  # what is replaced is released before more is allocated
        if self._stager is not None:
            self._stager.close()
        self._stager = DefaultStager(self._options)
        self._copy = self._stager.stage(tensors)  # type: ignore[assignment]

    def copy(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """A copy on the host; it is complete when this returns."""
        if not self.keeps_memory:
            stager = DefaultStager(self._options)
            copy: dict[str, Any] = stager.stage(tensors)  # type: ignore[assignment]
            stager.close()
            return copy
        if self._copy is None or not _is_like(self._copy, tensors):
            self.allocate(tensors)
        copy = _copied(tensors, self._copy)
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        return copy


def _is_like(copy: Any, source: Any) -> bool:
    """Whether a state dict's tensors fit into those of a copy."""
    if isinstance(source, Mapping):
        same = isinstance(copy, Mapping) and copy.keys() == source.keys()
        return same and all(_is_like(copy[name], source[name]) for name in source)
    if isinstance(source, list):
        same = isinstance(copy, list) and len(copy) == len(source)
        return same and all(map(_is_like, copy, source))
    if not isinstance(source, Tensor):
        return not isinstance(copy, Tensor)
    if type(copy) is not type(source):
        return False
    own, other = _local(copy), _local(source)
    return own.shape == other.shape and own.dtype == other.dtype


def _copied(source: Any, copy: Any) -> Any:
    """The state dict with its tensors copied into those of a copy that is like it."""
    if isinstance(source, Mapping):
        return {name: _copied(value, copy[name]) for name, value in source.items()}
    if isinstance(source, list):
        return list(map(_copied, source, copy))
    if not isinstance(source, Tensor):
        return source
    _local(copy).copy_(_local(source), non_blocking=True)
    return copy


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
