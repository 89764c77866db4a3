"""What one training worker is given for a run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.dataset.stream import TokenStream
from orpo_ray.pretrained import ModelSource

Report = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class TrainingJob:
    """All that one worker is given.

    Args:
        config: the run.
        model: where base model and tokenizer are.
        run_directory: absolute path.
        train: this rank's training stream.
        evals: this rank's evaluation streams by metric prefix (`eval_`, `eval_<name>_`).
        device: of this rank.
        report: told the latest metrics at every evaluation, by all ranks together.
        watch: shown every line of `metrics.jsonl` when it is written, on rank 0.
        preemption_notice: called about once a second by all ranks together; a text when one of
            their nodes is about to be preempted, upon which a checkpoint is saved.
    """

    config: ORPOConfig
    model: ModelSource
    run_directory: str
    train: TokenStream
    evals: Mapping[str, TokenStream]
    device: torch.device
    report: Report
    watch: Report = lambda line: None
    preemption_notice: Callable[[], str | None] = lambda: None
