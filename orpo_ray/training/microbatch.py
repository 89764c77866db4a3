"""A packed row as tensors on a worker's device."""

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from orpo_ray.dataset.packing import PackedRow
from orpo_ray.objective.head import Chunk, Targets
from orpo_ray.training.layout import PackedLayout, to_device


class Microbatch:
    """One forward and backward pass of work: a packed row, its layout and its targets.

    Not a dataclass on purpose: FSDP walks through those at every layer, and casts their numbers.

    Args:
        row: the packed row, moved to the device without waiting for it.
        device: of this rank.
    """

    def __init__(self, row: PackedRow, device: torch.device) -> None:
        def move(array: npt.NDArray[np.generic]) -> Tensor:
            return to_device(torch.from_numpy(array), device)

        self.token_ids: Int[Tensor, " tokens"] = move(row.token_ids)
        self.position_ids: Int[Tensor, " tokens"] = move(row.position_ids)
        self.multiplicity: Float[Tensor, " tokens"] = move(row.multiplicity)
        self.spans = row.spans
        self.layout = PackedLayout(row.spans, device)
        self.n_nll_tokens = row.n_nll_tokens
        self.n_pairs = row.n_pairs
        self.targets = Targets(
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
