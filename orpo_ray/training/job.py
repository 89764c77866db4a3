"""The inputs of one training worker."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.dataset.stream import TokenStream
from orpo_ray.pretrained import ModelSource
from orpo_ray.storage.folder import FolderLike

Report = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class TrainingJob:
    """The inputs of one training worker.

    Args:
        config: the run's config.
        model: source of the base model and its tokenizer.
        run_directory: absolute path of the run directory.
        train: this rank's training stream.
        evals: this rank's evaluation streams by metric prefix (`eval_`, `eval_<name>_`).
        device: of this rank.
        report: called with the latest metrics at every evaluation, on all ranks.
        watch: called with every line of `metrics.jsonl` when it is written, on rank 0.
        preemption_notice: called about once a second by all ranks together; a text when one of
            their nodes is about to be preempted, upon which a checkpoint is saved.
        compute_metrics: further metrics of an evaluation, of the scores of its pairs by prefix; on
            rank 0.
    """

    config: ORPOConfig
    model: ModelSource
    run_directory: FolderLike
    train: TokenStream
    evals: Mapping[str, TokenStream]
    device: torch.device
    report: Report
    watch: Report = lambda line: None
    preemption_notice: Callable[[], str | None] = lambda: None
    compute_metrics: Callable[[Mapping[str, Any]], Mapping[str, float]] = lambda scores: {}
