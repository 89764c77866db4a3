"""Metrics and scores of a model on evaluation sets; in training workers."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.dataset.packing import PackedRow
from orpo_ray.dataset.stream import StepBatch, TokenStream
from orpo_ray.models.build import build_evaluated_model, use_bf16
from orpo_ray.models.microbatch import Microbatch
from orpo_ray.models.orpo_model import OrpoModel, OrpoOutput
from orpo_ray.models.packing_check import check_packing
from orpo_ray.objective.metrics import N_SUMS, LossWeights, metrics_from_sums
from orpo_ray.objective.objectives import Objective, objective_of
from orpo_ray.objective.odds_ratio import log_odds
from orpo_ray.storage.folder import Folder
from orpo_ray.training.budget import head_chunk, with_plan
from orpo_ray.training.step import loss_scale

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
"""`source` and `row` count from 0, `prompt_key` is equal for pairs with the same prompt, `logps_*`
are mean log-probabilities per token in nats, `margin` is chosen minus rejected, without beta."""
_KNOWN = 5  # columns that no model is needed for


class PairScores:
    """Pairs as they are scored, microbatch by microbatch; what the model says stays on its device.

    So nothing waits for the device before the table is asked for.
    """

    def __init__(self) -> None:
        self._known: list[pa.Table] = []
        self._log_probs: list[Tensor] = []

    def add(self, row: PackedRow, output: OrpoOutput) -> None:
        """Take up the pairs of one microbatch that have two answers."""
        compared = row.compared
        if not len(compared):
            return
        lengths = row.completion_lengths.astype(np.int32)
        row_ids, prompt_keys = [row.row_ids[i] for i in compared], _prompt_keys(row)
        columns = [
            [row_id.source for row_id in row_ids],
            [row_id.row for row_id in row_ids],
            [prompt_keys[i] for i in compared],
            lengths[row.chosen[compared]],
            lengths[row.rejected[compared]],
        ]
        fields = list(SCHEMA)[:_KNOWN]
        arrays = [pa.array(c, f.type) for c, f in zip(columns, fields, strict=True)]
        self._known.append(pa.table(arrays, names=[field.name for field in fields]))
        both = torch.stack([output.chosen_log_probs, output.rejected_log_probs])
        self._log_probs.append(both if len(compared) == row.n_pairs else both[:, compared])

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


@dataclass(frozen=True)
class SetFigures:
    """Metric sums and pair scores of an evaluation set.

    Args:
        sums: (12,) of `batch_sums`, over all ranks.
        scores: table of `SCHEMA` with one row per pair; on rank 0 only.
    """

    sums: Tensor
    scores: pa.Table | None


@dataclass(frozen=True)
class EvaluationFigures:
    """What an evaluation of all sets finds.

    Args:
        metrics: of every set, each name after the set's prefix.
        scores: a row a pair, by the set's prefix; see `SCHEMA`. On rank 0 only.
    """

    metrics: dict[str, Any]
    scores: dict[str, pa.Table]


@torch.no_grad()
def evaluate(
    model: OrpoModel,
    batches: Iterable[StepBatch],
    objective: Objective,
    device: torch.device,
    progress: Callable[[float], object] = lambda batches: None,
) -> SetFigures:
    """The metrics of an evaluation set over all ranks, and the scores of its pairs.

    Args:
        model: left in training mode.
        batches: this rank's share of the set.
        objective: of the loss.
        device: of this rank.
        progress: told how many batches are done, or soon will be: nothing waits for the device.
    """
    sums = torch.zeros(N_SUMS, dtype=torch.float64, device=device)
    scores = PairScores()
    model.eval()
    for batch in batches:
        scale = loss_scale(batch, objective)
        for n_done, row in enumerate(batch.rows, start=1):
            output = model(Microbatch(row, device), scale)
            sums += output.sums
            scores.add(row, output)
            progress(batch.step + n_done / len(batch.rows))
    model.train()
    dist.all_reduce(sums)
    return SetFigures(sums, scores.gather())


def evaluate_streams(
    model: OrpoModel,
    evals: Mapping[str, TokenStream],
    objective: Objective,
    device: torch.device,
    progress: Callable[[float], object] = lambda share: None,
) -> EvaluationFigures:
    """Evaluate every set.

    Args:
        model: sharded over all ranks, each of which has to call this.
        evals: this rank's stream of every set, by metric prefix (`eval_`, `eval_<name>_`).
        objective: of the loss.
        device: of this rank.
        progress: told which share of all batches is done.
    """
    n_batches, n_before = sum(stream.steps_per_epoch for stream in evals.values()), 0

    def report(n_done: float) -> None:
        progress((n_before + n_done) / n_batches)

    weights = LossWeights(objective, model.router_coef)
    metrics: dict[str, Any] = {}
    scores: dict[str, pa.Table] = {}
    for prefix, stream in evals.items():
        batches = stream.batches(0, stream.steps_per_epoch)
        found = evaluate(model, batches, objective, device, report)
        n_before += stream.steps_per_epoch
        figures = metrics_from_sums(found.sums.tolist(), weights)
        metrics |= {prefix + name: value for name, value in figures.items()}
        if found.scores is not None:
            scores[prefix] = found.scores
    return EvaluationFigures(metrics, scores)


def run_evaluation(
    config: ORPOConfig,
    model_path: str | Folder,
    evals: Mapping[str, TokenStream],
    device: torch.device,
    notice: Callable[[str], None],
    progress: Callable[[float], object] = lambda share: None,
) -> EvaluationFigures:
    """Load a model and evaluate it; every rank calls this.

    Args:
        config: the run.
        model_path: folder or hub id, of a model or of LoRA adapters.
        evals: see `evaluate_streams`.
        device: of this rank.
        notice: told how a model of an unknown family is computed.
        progress: see `evaluate_streams`.

    Raises:
        UnsupportedModelError: for a model whose loss would be wrong or that cannot be read.
    """
    model = build_evaluated_model(config, model_path, device)
    chunk_tokens = head_chunk(config, model, device)  # the feed was planned without the device
    evals = {name: with_plan(part, chunk_tokens=chunk_tokens) for name, part in evals.items()}
    sample = next(iter(evals.values()))
    check_packing(model, sample, device, use_bf16(config, device), notice)
    return evaluate_streams(model, evals, objective_of(config.orpo), device, progress)
