"""Scores of pairs as a table, a row a pair; in training workers and data tasks."""

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from orpo_ray.dataset.packing import PackedRow
from orpo_ray.objective.odds_ratio import log_odds
from orpo_ray.training.model import OrpoOutput

SCHEMA = pa.schema(
    [
        ("source", pa.int32()),
        ("row", pa.int64()),
        ("prompt_key", pa.uint64()),
        ("chosen_tokens", pa.int32()),
        ("rejected_tokens", pa.int32()),
        ("logps_chosen", pa.float64()),
        ("logps_rejected", pa.float64()),
        ("log_odds", pa.float64()),
        ("margin", pa.float64()),
    ]
)
"""Source and row count from 0, `prompt_key` is equal for pairs of one prompt, `logps_*` are mean
log-probabilities a token of the two answers in nats, and `margin` is the one less the other."""
_KNOWN = 5  # columns that no model is needed for


class PairScores:
    """Pairs as they are scored, microbatch by microbatch; what the model says stays on its device.

    So nothing waits for the device before the table is asked for.
    """

    def __init__(self) -> None:
        self._known: list[pa.Table] = []
        self._log_probs: list[Tensor] = []

    def add(self, row: PackedRow, output: OrpoOutput) -> None:
        """Take up the pairs of one microbatch."""
        if not row.n_pairs:
            return
        lengths = row.completion_lengths.astype(np.int32)
        columns = [
            [row_id.source for row_id in row.row_ids],
            [row_id.row for row_id in row.row_ids],
            _prompt_keys(row),
            lengths[row.chosen],
            lengths[row.rejected],
        ]
        fields = list(SCHEMA)[:_KNOWN]
        arrays = [pa.array(c, f.type) for c, f in zip(columns, fields, strict=True)]
        self._known.append(pa.table(arrays, names=[field.name for field in fields]))
        self._log_probs.append(torch.stack([output.chosen_log_probs, output.rejected_log_probs]))

    def table(self) -> pa.Table:
        """A table of `SCHEMA` in the order in which pairs were added."""
        if not self._known:
            return SCHEMA.empty_table()
        chosen, rejected = torch.cat(self._log_probs, dim=1).double()
        figures = (chosen, rejected, log_odds(chosen, rejected), chosen - rejected)
        known = pa.concat_tables(self._known)
        columns = [*known.columns, *(pa.array(figure.cpu().numpy()) for figure in figures)]
        return pa.table(columns, schema=SCHEMA)

    def gather(self) -> pa.Table | None:
        """The pairs of all ranks by source and row, on rank 0; a collective, None elsewhere."""
        parts = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(self.table(), parts)
        if parts is None:
            return None
        return pa.concat_tables(parts).sort_by([("source", "ascending"), ("row", "ascending")])


def _prompt_keys(row: PackedRow) -> list[int]:
    """A hash of the prompt of every pair."""
    of_completion: list[int] = []
    start = 0
    for span in row.spans:
        prompt = row.token_ids[start : start + span.prompt]
        of_completion += [xxhash.xxh3_64_intdigest(prompt.tobytes())] * len(span.completions)
        start += span.n_tokens
    return [of_completion[completion] for completion in row.chosen]
