"""An evaluation on a terminal of 80 columns, and its progress in a file."""

import io
import json
import logging
import math
from pathlib import Path

from rich.console import Console

from orpo_ray.reports.evaluation import ScoringWatcher, show_evaluation
from orpo_ray.runs.statistics import (
    STATISTICS,
    Difference,
    Estimate,
    EvaluationResult,
    SetEvaluation,
)

WIDE = dict.fromkeys(STATISTICS, Estimate(-1.2345678, -1.12345678, -1.012345678))


def evaluation() -> EvaluationResult:
    shares = WIDE | {"accuracy": Estimate(0.9234567, 0.8934567, 0.9534567)}
    groups = {"a long name of a subset, as people give": {"pairs": 123456, "figures": shares}}
    apart = Difference(-0.123456, -0.223456, -0.023456, 0.012)
    names = ("accuracy", "length_controlled_accuracy", "log_odds", "logps_chosen", "logps_rejected")
    lengths = {"  12 to  345 tokens": {"pairs": 7, "figures": WIDE | {"accuracy": nothing()}}}
    part = SetEvaluation(123456, WIDE, groups, lengths, dict.fromkeys(names, apart), "s", 99)
    return EvaluationResult("runs/a", {"eval": part}, {})


def nothing() -> Estimate:
    return Estimate(math.nan, math.nan, math.nan)


def printed(width: int) -> list[str]:
    out = io.StringIO()
    show_evaluation(evaluation(), Console(file=out, width=width, soft_wrap=True))
    return out.getvalue().splitlines()


def test_no_line_is_wider_than_80_columns_and_nothing_is_cut() -> None:
    """In a file, where tables may be wider, as on a terminal."""
    for width in (80, 160):
        lines = printed(width)
        assert max(map(len, lines)) <= 80
        text = "\n".join(lines)
        for name in ("length-controlled accuracy", "log-prob. a token, rejected", "perplexity"):
            assert name in text
        assert "0.923 (0.893 to 0.953)  -1.235 (-1.123 to -1.012)" in text
        assert "…" not in text
        assert "model less baseline, paired on 99 pairs" in text
        rows = [line.split() for line in lines if line.split()[:1] == ["length-controlled"]]
        assert rows[1][2:] == ["-0.1235", "-0.2235", "to", "-0.02346", "0.012"]


def test_a_file_gets_a_line_each_tenth_and_the_last_one(tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO, "orpo_ray")
    path = tmp_path / "progress.jsonl"
    with ScoringWatcher(path, "baseline") as watcher:
        for share in (0.04, 0.125, 0.2, 0.5, 1.0):
            with path.open("a") as file:
                file.write(json.dumps({"share": share}) + "\n")
            watcher._show_new()
    shown = [record.message for record in caplog.records]
    assert shown == [f"baseline: {percent} % of the pairs are scored" for percent in (12, 50, 100)]
