"""A packed row as tensors on a worker's device, and its equivalent padded rows."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from orpo_ray.dataset.packing import ChunkRanges, Integers, PackedRow
from orpo_ray.models.attention.layout import PackedLayout, to_device
from orpo_ray.objective.head import Chunk, Part, Targets


class Microbatch:
    """Input of one forward and backward pass: a packed row, its layout and its targets.

    Not a dataclass on purpose: FSDP traverses dataclass arguments at every layer and casts them.

    Args:
        row: the packed row; it is copied to the device asynchronously.
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
        compared = row.compared
        self.compared = None if len(compared) == row.n_pairs else move(compared)
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
                Chunk(
                    chunk.positions,
                    chunk.targets,
                    chunk.completions,
                    chunk.pairs,
                    parts=tuple(_parts(row, chunk, move)),
                )
                for chunk in row.chunks
            ),
        )


def _parts(
    row: PackedRow, chunk: ChunkRanges, move: Callable[[Integers], Tensor]
) -> Iterator[Part]:
    """The parts of a chunk that is longer than the head may project at once."""
    first, last = chunk.positions
    if last - first <= row.chunk_tokens:
        return
    at = row.predicted_at[slice(*chunk.targets)] - first
    for start in range(0, last - first, row.chunk_tokens):
        stop = min(start + row.chunk_tokens, last - first)
        yield Part((start, stop), move(np.flatnonzero((start <= at) & (at < stop))))


@dataclass(frozen=True)
class PaddedRows:
    """Each completion with its own prompt before it, padded on the right.

    Args:
        token_ids: one row a completion.
        attention_mask: 1 for tokens, 0 for padding.
        source: for each token of the rows, its index in the packed row; 0 for padding.
        where: for each token of the packed row, its index in the flattened rows; a prompt is
            read from its first completion's row.
        lengths: tokens of each row, on the host.
    """

    token_ids: Int[Tensor, "rows width"]
    attention_mask: Int[Tensor, "rows width"]
    source: Int[Tensor, "rows width"]
    where: Int[Tensor, " tokens"]
    lengths: tuple[int, ...]


def pad_rows(batch: Microbatch) -> PaddedRows:
    """Convert a packed row to padded rows."""
    sequences: list[tuple[range, range]] = []  # prompt and completion, as ranges of the row
    first_rows: list[int] = []
    start = 0
    for span in batch.spans:
        prompt = range(start, start + span.prompt)
        first_rows.append(len(sequences))
        token = prompt.stop
        for length in span.completions or (0,):
            sequences.append((prompt, range(token, token + length)))
            token += length
        start = token
    width = max(len(prompt) + len(completion) for prompt, completion in sequences)
    source = torch.zeros(len(sequences), width, dtype=torch.int64)
    mask = torch.zeros_like(source)
    where = torch.zeros(start, dtype=torch.int64)
    for row, (prompt, completion) in enumerate(sequences):
        length = len(prompt) + len(completion)
        source[row, :length] = torch.tensor([*prompt, *completion])
        mask[row, :length] = 1
        own = torch.arange(length) + row * width
        where[completion.start : completion.stop] = own[len(prompt) :]
        if row in first_rows:
            where[prompt.start : prompt.stop] = own[: len(prompt)]
    device = batch.token_ids.device
    source, mask, where = (to_device(t, device) for t in (source, mask, where))
    lengths = tuple(len(prompt) + len(completion) for prompt, completion in sequences)
    return PaddedRows(batch.token_ids[source] * mask, mask, source, where, lengths)
