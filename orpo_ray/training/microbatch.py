"""A packed row as tensors on a worker's device."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from orpo_ray.objective.head import Chunk, Targets
from orpo_ray.preference.groups import RowId
from orpo_ray.preference.packing import GroupSpan, PackedRow
from orpo_ray.training.attention import PackedLayout


@dataclass(frozen=True)
class Microbatch:
    """One forward and backward pass of work: a packed row, its layout and its targets.

    Args:
        token_ids: the row.
        position_ids: position of every token in its own (prompt + completion) sequence.
        multiplicity: how often each token would stand in padded rows.
        layout: who attends to whom.
        targets: what is predicted.
        n_nll_tokens: tokens of the NLL, each as often as pairs count it.
        row_ids: source row of every pair.
    """

    token_ids: Int[Tensor, " tokens"]
    position_ids: Int[Tensor, " tokens"]
    multiplicity: Float[Tensor, " tokens"]
    spans: tuple[GroupSpan, ...]
    layout: PackedLayout
    targets: Targets
    n_nll_tokens: int
    row_ids: tuple[RowId, ...]

    @property
    def n_pairs(self) -> int:
        """Pairs in this row."""
        return len(self.row_ids)

    @staticmethod
    def of(row: PackedRow, device: torch.device) -> "Microbatch":
        """Move a packed row to a device, without waiting for it."""

        def move(array: npt.NDArray[np.generic]) -> Tensor:
            host = torch.from_numpy(array)
            if device.type != "cuda":
                return host
            return host.pin_memory().to(device, non_blocking=True)

        targets = Targets(
            positions=move(row.positions),
            predicted_at=move(row.predicted_at),
            token_ids=move(row.target_ids),
            nll_weights=move(row.nll_weights),
            completion=move(row.completion),
            completion_lengths=move(row.completion_lengths),
            chosen=move(row.chosen),
            rejected=move(row.rejected),
            chunks=tuple(
                Chunk(chunk.positions, chunk.targets, chunk.completions, chunk.pairs)
                for chunk in row.chunks
            ),
        )
        return Microbatch(
            token_ids=move(row.token_ids),
            position_ids=move(row.position_ids),
            multiplicity=move(row.multiplicity),
            spans=row.spans,
            layout=PackedLayout.of(row.spans, device),
            targets=targets,
            n_nll_tokens=row.n_nll_tokens,
            row_ids=row.row_ids,
        )
