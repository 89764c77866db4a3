"""Metrics of a model over evaluation sets, without training it; in training workers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.dataset.stream import TokenStream
from orpo_ray.objective.metrics import OrpoWeights, metrics_from_sums
from orpo_ray.training.model import OrpoModel
from orpo_ray.training.sharding import build_model, use_bf16
from orpo_ray.training.step import evaluate
from orpo_ray.training.verify import settle_attention


@dataclass(frozen=True)
class EvaluationFigures:
    """What an evaluation of all sets finds.

    Args:
        metrics: of every set, each name after the set's prefix.
        scores: a row a pair, by the set's prefix; see `pair_scores.SCHEMA`. On rank 0 only.
    """

    metrics: dict[str, Any]
    scores: dict[str, pa.Table]


def evaluate_streams(
    model: OrpoModel, evals: Mapping[str, TokenStream], beta: float, device: torch.device
) -> EvaluationFigures:
    """Evaluate every set.

    Args:
        model: sharded over all ranks, each of which has to call this.
        evals: this rank's stream of every set, by metric prefix (`eval_`, `eval_<name>_`).
        beta: weight of the odds-ratio term.
        device: of this rank.
    """
    weights = OrpoWeights(beta, model.router_coef)
    metrics: dict[str, Any] = {}
    scores: dict[str, pa.Table] = {}
    for prefix, stream in evals.items():
        found = evaluate(model, stream.batches(0, stream.steps_per_epoch), beta, device)
        figures = metrics_from_sums(found.sums.tolist(), weights)
        metrics |= {prefix + name: value for name, value in figures.items()}
        if found.scores is not None:
            scores[prefix] = found.scores
    return EvaluationFigures(metrics, scores)


def run_evaluation(
    config: ORPOConfig,
    model_path: str,
    evals: Mapping[str, TokenStream],
    device: torch.device,
    notice: Callable[[str], None],
) -> dict[str, Any]:
    """Load a model and evaluate it; see `evaluate_streams`."""
    model = build_model(config, model_path, device)
    stream = next(iter(evals.values()))
    settle_attention(model, stream, device, use_bf16(config, device), notice)
    return evaluate_streams(model, evals, config.orpo.beta, device).metrics
