"""The padded way to run a packed row, for decoders that cannot attend over one."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from orpo_ray.training.layout import to_device
from orpo_ray.training.microbatch import Microbatch


@dataclass(frozen=True)
class PaddedRows:
    """Each completion with its own prompt before it, padded on the right.

    Args:
        token_ids: one row a completion.
        attention_mask: 1 for tokens, 0 for padding.
        where: for each token of the packed row, its index in the flattened rows; a prompt is
            read from its first completion's row.
    """

    token_ids: Int[Tensor, "rows width"]
    attention_mask: Int[Tensor, "rows width"]
    where: Int[Tensor, " tokens"]


def pad_rows(batch: Microbatch) -> PaddedRows:
    """Lay a packed row out as padded rows."""
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
    return PaddedRows(batch.token_ids[source] * mask, mask, where)
