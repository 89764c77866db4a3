"""The margin of every pair each time it is trained on; in training workers."""

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from orpo_ray.preference.groups import RowId
from orpo_ray.runs.files import RunFiles

PairMargins = tuple[tuple[RowId, ...], Tensor]
"""Pairs of one microbatch, and log-probability of the chosen answer less that of the rejected."""


class MarginLog:
    """Keeps margins on the device until they are written to `margins.jsonl`, many steps at once.

    Args:
        files: of the run directory.
    """

    def __init__(self, files: RunFiles) -> None:
        self._files = files
        self._steps: list[tuple[int, tuple[RowId, ...]]] = []
        self._parts: list[tuple[int, PairMargins]] = []

    def add(self, step: int, rows: tuple[RowId, ...], margins: Sequence[PairMargins]) -> None:
        """Take up a step.

        Args:
            step: optimizer steps done, this one included.
            rows: of the global batch, in the order in which they are written.
            margins: this rank's share.
        """
        self._steps.append((step, rows))
        self._parts += [(step, part) for part in margins if part[0]]

    def flush(self) -> None:
        """Write what was added since the last time; a collective and one wait for the device."""
        if not self._steps:
            return
        tensors = [margins for _, (_, margins) in self._parts]
        figures = torch.cat(tensors).tolist() if tensors else []
        keys = [(step, row_id) for step, (row_ids, _) in self._parts for row_id in row_ids]
        mine = list(zip(keys, figures, strict=True))
        everywhere = [mine] * dist.get_world_size() if self._files.is_writer else None
        dist.gather_object(mine, everywhere)
        if everywhere is not None:
            found: defaultdict[tuple[int, RowId], list[float]] = defaultdict(list)
            for part in everywhere:
                for key, figure in part:
                    found[key].append(figure)
            for step, rows in self._steps:
                self._files.margins(step, [found[step, row_id].pop(0) for row_id in rows])
        self._steps, self._parts = [], []
