"""Scores of pairs as transformers' predictions; on the driver and on workers."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import EvalPrediction


def pair_scores(table: pa.Table) -> Any:
    """(pairs, 2): the mean log-probability of a token of chosen and of rejected."""
    columns = [table[name].to_numpy() for name in ("logps_chosen", "logps_rejected")]
    return np.stack(columns, axis=1)


def computed_metrics(
    compute: Callable[[EvalPrediction], dict[str, float]], tables: Mapping[str, pa.Table]
) -> dict[str, float]:
    """What a function of the user makes of the scores of every set, by the set's prefix."""
    metrics: dict[str, float] = {}
    for prefix, table in tables.items():
        scores = pair_scores(table)
        found = compute(EvalPrediction(scores, np.zeros(len(scores), np.int64)))
        metrics |= {prefix + name.removeprefix("eval_"): float(v) for name, v in found.items()}
    return metrics
